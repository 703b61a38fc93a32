"""What sampling parameters and text cost: variants of a workload, in turn on one engine.

The variants take turns within every repeat, so that a slow phase of the machine hits all alike.
Nothing is told of them before their outputs have been checked.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import Setting, Tokens, llm_options
from benchmarks.reference import Agreement, Reference, WrongOutputError
from benchmarks.tokenizer import with_tokenizer
from benchmarks.workloads import Workload, check_workload, random_workload, seeds_workload
from llm import LLM
from memory.sizing import release_device
from utils.checkpoint import open_checkpoint
from utils.text import decoder

# Requests of the two workloads on a CPU, which would need hours for those of a GPU.
_ON_CPU = 8
_STOP = "a text that is in no output"
# Filters that leave the most likely token alone.
_NARROWEST: tuple[dict[str, Any], ...] = ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0})
_CHECKED_TOKENS = 32


@dataclass(frozen=True)
class Variant:
    """A workload's requests with parameters of their own.

    Attributes:
        text: False gives tokens alone, as without a tokenizer.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    text: bool = True


FILTERS = (
    Variant("plain"),
    Variant("top_k=50", {"top_k": 50}),
    Variant("top_p=0.9", {"top_p": 0.9}),
    Variant("top_k=50, top_p=0.9", {"top_k": 50, "top_p": 0.9}),
    Variant("min_p=0.05", {"min_p": 0.05}),
    Variant("repetition_penalty=1.1", {"repetition_penalty": 1.1}),
    Variant("logprobs=0", {"logprobs": 0}),
)
TEXTS = (
    Variant("tokens alone", text=False),
    Variant("text"),
    Variant("text, a stop string", {"stop": _STOP}),
)


@dataclass(frozen=True)
class Timed:
    """One variant.

    Attributes:
        seconds: wall time of every repeat.
        step_seconds: of every repeat the median time from one step to the next, of the steps in
            the middle half.
        ratios: of times to those of the first variant, repeat by repeat.
    """

    name: str
    output_tokens: int
    seconds: list[float]
    step_seconds: list[float]
    ratios: list[float]

    @property
    def rate(self) -> float:
        """Output tokens per second, median over the repeats."""
        return self.output_tokens / statistics.median(self.seconds)


@dataclass(frozen=True)
class Variants:
    """What was measured on a workload.

    Attributes:
        compared: whose times the ratios are of.
        agreement: of the engine's greedy tokens with transformers.
        checked: what else was checked, in words.
    """

    workload: str
    num_requests: int
    compared: str
    timed: list[Timed]
    agreement: Agreement
    checked: str


@dataclass(frozen=True)
class _Run:
    seconds: float
    step_seconds: float
    outputs: list[dict[str, Any]]

    @property
    def tokens(self) -> Tokens:
        return [out["token_ids"] for out in self.outputs]


def filters_workload(device: str, vocab_size: int) -> Workload:
    """128 tokens in and 256 out, at a temperature of 0.6."""
    count = 256 if device == "cuda" else _ON_CPU
    work = random_workload("filters", count, (128, 128), (256, 256), vocab_size)
    return replace(work, temperature=0.6)


def text_workload(device: str, vocab_size: int) -> Workload:
    """The requests of `seeds`."""
    return seeds_workload(256 if device == "cuda" else _ON_CPU, vocab_size)


def measure_filters(setting: Setting, work: Workload, repeats: int) -> Variants:
    """What filters, penalties and log-probabilities add to the time of a decode step.

    Checked first: greedy tokens, and those drawn with filters that leave the most likely token
    alone, are what transformers would take; and top_k=50 draws none beyond the 50 most likely.

    Raises:
        WrongOutputError: they are not.
    """
    short = replace(work, lengths=[min(n, _CHECKED_TOKENS) for n in work.lengths])
    greedy = replace(short, temperature=0.0)
    with LLM(setting.model, **llm_options(setting)) as llm:
        outputs = [_run(llm, greedy, Variant("greedy")).tokens]
        outputs += [_run(llm, short, Variant(str(one), one)).tokens for one in _NARROWEST]
        _check_top(_run(llm, short, Variant("", {"top_k": 50, "logprobs": 50})).outputs, 50)
        runs = _take_turns(llm, work, FILTERS, repeats, lambda variant, outputs: None)
    agreement = _judged(setting, [(greedy, tokens) for tokens in outputs])
    equal = sum(tokens == outputs[0] for tokens in outputs[1:])
    checked = (
        f"top_k=1, top_p=1e-6 and min_p=1 give greedy tokens ({equal} of {len(outputs) - 1} all "
        "the same, others differ by ties); top_k=50 none beyond the first 50"
    )
    timed = _timed(FILTERS, runs, work, [[run.step_seconds for run in of] for of in runs])
    return Variants(work.name, len(work.prompts), "a decode step", timed, agreement, checked)


def measure_text(setting: Setting, work: Workload, repeats: int) -> Variants:
    """What text adds to the time of a workload, and stop strings that have to be looked for.

    A checkpoint without a tokenizer gets one of its vocabulary's size. Checked first: the texts
    are what the tokenizer itself makes of the tokens, and greedy tokens what transformers would
    take.

    Raises:
        WrongOutputError: they are not.
    """
    with tempfile.TemporaryDirectory() as scratch:
        vocab_size = _vocab_size(setting)
        model = with_tokenizer(Path(setting.model), Path(scratch), vocab_size)
        greedy = check_workload(vocab_size, setting.max_model_len)
        with LLM(model, **llm_options(setting)) as llm:
            tokens = _run(llm, greedy, Variant("greedy")).tokens
            tokenizer = llm.tokenizer
            runs = _take_turns(
                llm,
                work,
                TEXTS,
                repeats,
                lambda variant, outputs: _check_texts(tokenizer, variant, outputs),
            )
        agreement = _judged(setting, [(greedy, tokens)])
    timed = _timed(TEXTS, runs, work, [[run.seconds for run in of] for of in runs])
    checked = "every text is what the tokenizer makes of its tokens"
    return Variants(work.name, len(work.prompts), "a run", timed, agreement, checked)


def _take_turns(
    llm: LLM,
    work: Workload,
    variants: Sequence[Variant],
    repeats: int,
    check: Callable[[Variant, list[dict[str, Any]]], None],
) -> list[list[_Run]]:
    """The timed runs of each variant, after a warm-up of each whose outputs are checked."""
    for variant in variants:
        check(variant, _run(llm, work, variant).outputs)
    runs: list[list[_Run]] = [[] for _ in variants]
    for _ in range(repeats):
        for variant, of in zip(variants, runs, strict=True):
            # Without the outputs, which would only pile up.
            of.append(replace(_run(llm, work, variant), outputs=[]))
    return runs


def _run(llm: LLM, work: Workload, variant: Variant) -> _Run:
    """One run, with nothing in the prefix cache.

    Raises:
        WrongOutputError: an output has not the length that was asked for.
    """
    llm.reset_prefix_cache()
    params = work.sampling_params(**variant.params)
    decode = llm.decode
    if not variant.text:
        llm.decode = decoder(None)
    outputs: dict[int, dict[str, Any]] = {}
    ends = [time.perf_counter()]
    for prompt, one in zip(work.prompts, params, strict=True):
        llm.add_request(prompt, one)
    while llm.has_unfinished:
        outputs |= {out["request_id"]: out for out in llm.step()}
        ends.append(time.perf_counter())
    llm.decode = decode
    ordered = [outputs[request_id] for request_id in sorted(outputs)]
    if [len(out["token_ids"]) for out in ordered] != work.lengths:
        raise WrongOutputError(f"wrong outputs, so no rate: wrong lengths with {variant.name}")
    steps = [b - a for a, b in pairwise(ends)]
    middle = steps[len(steps) // 4 : -(len(steps) // 4) or None]
    return _Run(ends[-1] - ends[0], statistics.median(middle), ordered)


def _timed(
    variants: Sequence[Variant],
    runs: list[list[_Run]],
    work: Workload,
    times: list[list[float]],
) -> list[Timed]:
    """Args: times: of each variant's repeats, what is to be compared."""
    return [
        Timed(
            variant.name,
            work.num_output_tokens,
            [run.seconds for run in of],
            [run.step_seconds for run in of],
            [own / first for own, first in zip(its, times[0], strict=True)],
        )
        for variant, of, its in zip(variants, runs, times, strict=True)
    ]


def _check_top(outputs: list[dict[str, Any]], num_top: int) -> None:
    """Of each token's log-probabilities, its own first, none but ties lie behind `num_top`."""
    for out in outputs:
        for found in out["logprobs"]:
            own, *_ = found.values()
            if sum(value > own for value in found.values()) >= num_top:
                raise WrongOutputError(f"wrong outputs, so no rate: a token beyond top_k={num_top}")


def _check_texts(tokenizer: Any, variant: Variant, outputs: list[dict[str, Any]]) -> None:
    for out in outputs:
        tokens, expected = out["token_ids"], ""
        if variant.text:
            expected = tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        if out["text"] != expected:
            raise WrongOutputError(
                f"wrong outputs, so no rate: with {variant.name!r} a text is not what the "
                "tokenizer makes of its tokens"
            )


def _judged(setting: Setting, runs: list[tuple[Workload, Tokens]]) -> Agreement:
    """Compare greedy tokens with transformers; the engine must be closed."""
    reference = Reference(setting)
    found = [reference.judge(work, tokens) for work, tokens in runs]
    del reference
    release_device(torch.device(setting.device))
    return Agreement(sum(one.exact for one in found), sum(one.total for one in found))


def _vocab_size(setting: Setting) -> int:
    return int(open_checkpoint(setting.model).hf_config.vocab_size)


# Workloads of this engine alone, by --workload name.
VARIANTS: dict[
    str, tuple[Callable[[str, int], Workload], Callable[[Setting, Workload, int], Variants]]
] = {
    "filters": (filters_workload, measure_filters),
    "text": (text_workload, measure_text),
}
