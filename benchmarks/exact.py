"""Which requests keep their bits in company: the workload `exact`.

Every request runs alone first. Then the same requests run in every setting, e.g. in a batch or in
small chunks, and each is compared with itself alone. Its bits are its token ids, the bits of its
log-probabilities, and a hash of the logits from which each of its tokens was drawn.

A request with a logits processor is in one step at a time, and its tokens are drawn by other
kernels. So every setting runs twice: as it is, for tokens and log-probabilities, and with a
processor that hashes the logits. The tokens have to be equal in all runs.

On a CPU the order of a product's sums depends on the number of rows. There the engine promises
only that tokens are equal, and only lost tokens count as a failure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.engines import Setting, llm_options
from benchmarks.exact_processors import hashes_of
from benchmarks.exact_settings import Company, Evidence, Output, Request, Requests, engines_of
from benchmarks.reference import WrongOutputError
from llm import LLM


@dataclass(frozen=True)
class Answer:
    """The bits of a request's output.

    Attributes:
        hashed_tokens: token ids of the run with the processor that hashes.
        logprobs: for each token, pairs of a token id and a log-probability in hexadecimal.
        logits: result of `hashes_of`.
    """

    tokens: list[int]
    hashed_tokens: list[int]
    logprobs: list[list[tuple[int, str]]] | None
    logits: tuple[str, ...]

    @staticmethod
    def of(plain: Output, hashed: Output, logits: tuple[str, ...]) -> Answer:
        found = plain["logprobs"]
        if found is not None:
            found = [[(token, value.hex()) for token, value in one.items()] for one in found]
        return Answer(plain["token_ids"], hashed["token_ids"], found, logits)


@dataclass(frozen=True)
class Kept:
    """How many requests have the same bits in a setting as alone.

    Attributes:
        num_requests, num_scored: all requests, and those that ask for log-probabilities.
        tokens, logprobs, logits: how many keep these; `bits` is how many keep all of them.
        note: what else the setting has shown, e.g. the number of preemptions.
        problem: why the setting was not really tested; "" if it was.
    """

    setting: str
    num_requests: int
    num_scored: int
    tokens: int
    logprobs: int
    logits: int
    bits: int
    note: str = ""
    problem: str = ""

    def failure(self, promised: str) -> str | None:
        """What is wrong, in words. `promised` is "bits", or "tokens" where bits may differ."""
        if self.problem:
            return f"{self.setting}: {self.problem}"
        lost = self.num_requests - int(getattr(self, promised))
        return f"{self.setting}: {lost} of {self.num_requests} lost {promised}" if lost else None


def promise(device: str) -> str:
    """What every request has to keep on a device: a name for `Kept.failure`."""
    return "bits" if device == "cuda" else "tokens"


def compare(
    setting: str, alone: list[Answer], found: list[Answer], evidence: Evidence = ("", "")
) -> Kept:
    """Count the answers that are the same as alone."""
    pairs = list(zip(alone, found, strict=True))
    tokens = [
        a.tokens == a.hashed_tokens == b.tokens and b.tokens == b.hashed_tokens for a, b in pairs
    ]
    logprobs = [a.logprobs == b.logprobs for a, b in pairs]
    logits = [a.logits == b.logits for a, b in pairs]
    scored = [same for same, (a, _) in zip(logprobs, pairs, strict=True) if a.logprobs is not None]
    return Kept(
        setting,
        num_requests=len(pairs),
        num_scored=len(scored),
        tokens=sum(tokens),
        logprobs=sum(scored),
        logits=sum(logits),
        bits=sum(map(all, zip(tokens, logprobs, logits, strict=True))),
        note=evidence[0],
        problem=evidence[1],
    )


def measure_exact(setting: Setting, num_requests: int) -> Iterator[Kept]:
    """Run the requests alone, then in every setting.

    Raises:
        WrongOutputError: a request alone has not the output that was asked for.
    """
    make = Requests(setting)
    requests = make.requests(num_requests)
    alone: list[Answer] = []
    for name, options, companies in engines_of(make, requests):
        with LLM(setting.model, **{**llm_options(setting), **options}) as llm:
            if not alone:
                alone, _ = answers_of(llm, Company("alone", one_by_one=True), requests)
                _check(requests, alone)
            for company in companies:
                label = ", ".join(filter(None, (company.name, name)))
                yield compare(label, alone, *answers_of(llm, company, requests))


def answers_of(
    llm: LLM, company: Company, requests: list[Request]
) -> tuple[list[Answer], Evidence]:
    """The requests' answers, from a run as they are and one with hashes."""
    plain, others = company.serve(llm, requests)
    with tempfile.TemporaryDirectory() as folder:
        hashed, _ = company.serve(llm, requests, folder)
        company.settle(llm)
        logits = [hashes_of(folder, one.index) for one in requests]
    found = [Answer.of(*one) for one in zip(plain, hashed, logits, strict=True)]
    return found, company.shows(plain, others)


def _check(requests: list[Request], alone: list[Answer]) -> None:
    """Without this, requests that fail alike in every setting would count as kept."""
    for one, answer in zip(requests, alone, strict=True):
        lengths = [len(answer.tokens), *(len(text.splitlines()) for text in answer.logits)]
        if lengths != [one.params.max_tokens] * 2:
            raise WrongOutputError(
                f"request {one.index} alone: {one.params.max_tokens} tokens were asked for, and "
                f"the numbers of tokens and of hashes of each rank's logits are {lengths}"
            )
