"""The settings of the workload `exact`: its requests, what runs beside them, on which engines."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.engines import Setting
from benchmarks.exact_processors import HashLogits, break_logits, flatten
from engine.policies import StepPolicy
from llm import LLM
from sampling_params import SamplingParams
from utils.checkpoint import open_checkpoint

Output = dict[str, Any]
# What runs have shown of a setting, in words, and why the setting was not really tested, if so.
Evidence = tuple[str, str]

_LONGEST_PROMPT = 700
_NUM_OTHERS = 500
_OTHERS_TOKENS = (8, 32)
_SEEDED = {"temperature": 0.7, "seed": 7}
# Half of the requests have options that read or change its logits. Steps with such a request draw
# tokens in another way, so these requests end early and leave steps without any to the others.
_OPTIONS: dict[int, dict[str, Any]] = {
    2: {"logprobs": 3},
    3: {"top_k": 50, "top_p": 0.9},
    5: {"logprobs": 0},
    6: {"repetition_penalty": 1.2},
}
_NUM_TOKENS, _NUM_TOKENS_WITH_OPTIONS = 24, 12
_NEIGHBOURS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.9, "top_k": 20},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.7, "prompt_logprobs": 2},
    {"temperature": 0.7, "logits_processors": (flatten,)},
    {"temperature": 0.7, "min_tokens": 4},
    {"temperature": 0.9, "logit_bias": {5: 3.0, 7: -100.0}, "bad_words_ids": [[9], [10, 11]]},
    {"temperature": 0.9, "allowed_token_ids": tuple(range(100))},
)


class ChunksOf64(StepPolicy):
    """All decoding requests run in each step, with at most 64 prompt tokens."""

    name = "chunks_of_64"

    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        return min(64, budget - num_decodes)


@dataclass(frozen=True)
class Request:
    """A prompt, the parameters of its output, and its number among the requests."""

    index: int
    prompt: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Company:
    """What requests run beside.

    Attributes:
        others: requests that run at the same time.
        before: requests that run before, and leave their prefixes in the cache.
        one_by_one: run each request alone.
        shows: makes the evidence from the outputs of the requests and of the others.
    """

    name: str
    others: tuple[Request, ...] = ()
    before: tuple[Request, ...] = ()
    one_by_one: bool = False
    shows: Callable[[list[Output], list[Output]], Evidence] = lambda own, others: ("", "")

    def serve(
        self, llm: LLM, requests: list[Request], folder: str | None = None
    ) -> tuple[list[Output], list[Output]]:
        """The outputs of the requests and of the others; hashes of logits go to `folder`."""
        llm.reset_prefix_cache()
        if self.before:
            _generate(llm, self.before)
        if folder is not None:
            requests = [_hashing(one, folder) for one in requests]
        if self.one_by_one:
            return [_generate(llm, [one])[0] for one in requests], []
        # Shuffled, so that the requests have other rows in a step than in the batch of them alone.
        served = [*requests, *self.others]
        order = random.Random(self.name).sample(range(len(served)), len(served))
        found = _generate(llm, [served[i] for i in order])
        outputs = [found[order.index(i)] for i in range(len(served))]
        return outputs[: len(requests)], outputs[len(requests) :]

    @staticmethod
    def settle(llm: LLM) -> None:
        """Wait until the processes of all ranks have ended all steps so far.

        An output is there once rank 0 has ended its last step, while another rank may still write
        the hashes of this step. A further step needs all ranks, and each of them begins it after
        all earlier ones.
        """
        llm.generate([[0]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)


def _hashing(one: Request, folder: str) -> Request:
    hasher = HashLogits(folder, one.index)
    return replace(one, params=replace(one.params, logits_processors=(hasher,)))


def _generate(llm: LLM, requests: Sequence[Request]) -> list[Output]:
    prompts = [one.prompt for one in requests]
    return [*llm.generate(prompts, [one.params for one in requests], use_tqdm=False)]


class Requests:
    """Makes requests with random prompts; the same ones for the same model and device."""

    def __init__(self, setting: Setting) -> None:
        self.cuda = setting.device == "cuda"
        self._vocab_size = int(open_checkpoint(setting.model).hf_config.vocab_size)
        self._longest = min(_LONGEST_PROMPT, setting.max_model_len - max(_OTHERS_TOKENS))
        self._rng = random.Random(0)

    def requests(self, count: int) -> list[Request]:
        """Greedy ones and seeded ones in turn, with prompts of 16 tokens to the longest."""
        lengths = [16 + (self._longest - 16) * i // max(1, count - 1) for i in range(count)]
        self._rng.shuffle(lengths)
        made = []
        for i, length in enumerate(lengths):
            options = _OPTIONS.get(i % 8, {})
            drawn: dict[str, Any] = {"temperature": 0.8, "seed": i} if i % 2 else {"temperature": 0}
            num_tokens = _NUM_TOKENS_WITH_OPTIONS if options else _NUM_TOKENS
            made.append(self.request(i, length, num_tokens, **drawn, **options))
        return made

    def others(self, count: int, *kinds: dict[str, Any]) -> tuple[Request, ...]:
        """Requests of mixed lengths, whose parameters are the `kinds` in turn."""
        lengths, numbers = (16, self._longest), _OTHERS_TOKENS
        return tuple(
            self.request(
                i, self._rng.randint(*lengths), self._rng.randint(*numbers), **kinds[i % len(kinds)]
            )
            for i in range(count)
        )

    def request(self, index: int, length: int, num_tokens: int, **params: Any) -> Request:
        """A request of `length` tokens in and `num_tokens` out."""
        prompt = [self._rng.randrange(self._vocab_size) for _ in range(length)]
        asked = SamplingParams(max_tokens=num_tokens, ignore_eos=True, **params)
        return Request(index, prompt, asked)


def engines_of(
    make: Requests, requests: list[Request]
) -> Iterator[tuple[str, dict[str, Any], list[Company]]]:
    """Engines by what they have other than the first, their options, and the companies on each.

    Starting an engine takes longer than most runs, so an engine serves as many as it can.
    """
    batch, cached = Company(""), _after_prefixes(requests)
    # A CPU would need minutes for the others of a GPU.
    crowd = make.others(_NUM_OTHERS if make.cuda else 2 * len(requests), _SEEDED)
    beside = make.others(len(requests), *_NEIGHBOURS)
    first = [
        Company("alone again", one_by_one=True),
        replace(batch, name=f"in a batch of {len(requests)}"),
        Company(f"among {len(crowd)} others", crowd),
        cached,
        Company("beside other options", beside, shows=_no_errors),
        _beside_broken(make, len(requests)),
    ]
    yield "", {}, first
    yield "prefill in chunks of 64", {"step_policy": ChunksOf64}, [batch]
    yield "1,024 tokens a step at most", {"max_num_batched_tokens": 1024}, [batch]
    # The first engine has the default: 1 on CUDA, 0 on a CPU.
    depth = 0 if make.cuda else 1
    yield f"pipeline depth {depth}", {"pipeline_depth": depth}, [batch]
    if make.cuda:
        yield "eager, no CUDA graphs", {"enforce_eager": True}, [batch]
    for size in (16, 64):
        yield f"KV blocks of {size}", {"kvcache_block_size": size}, [batch, cached]
    options, preempting = _preempting(make, requests)
    yield "", options, [preempting]


def _after_prefixes(requests: list[Request]) -> Company:
    """A quarter, half, three quarters or all of each prompt was computed before."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    lengths = [max(1, len(one.prompt) * (1 + i % 4) // 4) for i, one in enumerate(requests)]
    before = tuple(
        Request(i, one.prompt[:n], params)
        for i, (one, n) in enumerate(zip(requests, lengths, strict=True))
    )
    return Company("prefix hits", before=before, shows=_hits)


def _beside_broken(make: Requests, count: int) -> Company:
    """Half of the others have logits of NaN, which has to end these requests alone."""
    broken = {**_SEEDED, "logits_processors": (break_logits,)}
    others = make.others(count, broken, _SEEDED)

    def shows(own: list[Output], found: list[Output]) -> Evidence:
        ended = sum(out["error"] is not None for out in found)
        expected = sum(bool(one.params.logits_processors) for one in others)
        problem = "" if ended == expected else f"{ended} of {expected} with NaN got an error"
        return f"{ended} others ended by an error", problem

    return Company("beside logits of NaN", others, shows=shows)


def _preempting(make: Requests, requests: list[Request]) -> tuple[dict[str, Any], Company]:
    """Options with KV blocks for all prompts alone, and others that grow and preempt requests.

    A preempted request frees blocks for many others to grow. With six others for each of 64
    requests, 17 of the requests are preempted; without any others, one.
    """
    size, count = 16, 6 * len(requests)
    others = tuple(make.request(i, size, 2 * size, **_SEEDED, priority=1) for i in range(count))
    options = {
        "kvcache_block_size": size,
        "num_kvcache_blocks": sum(-(-len(one.prompt) // size) for one in (*requests, *others)),
        # The size in bytes would contradict the number of blocks.
        "kvcache_memory_bytes": None,
        "max_num_seqs": len(requests) + count,
        "preemption_policy": "lowest_priority",
    }
    return options, Company("preempted", others, shows=_preemptions)


def _preemptions(own: list[Output], others: list[Output]) -> Evidence:
    count = sum(out["metrics"]["preemptions"] > 0 for out in own)
    return f"{count} preempted", "" if count else "no request was preempted"


def _hits(own: list[Output], others: list[Output]) -> Evidence:
    hits = [n for out in own if (n := out["metrics"]["cached_prompt_tokens"])]
    if not hits:
        return "", "no prefix was found in the cache"
    return f"{len(hits)} hits of {min(hits)} to {max(hits)} tokens", ""


def _no_errors(own: list[Output], others: list[Output]) -> Evidence:
    errors = sum(out["error"] is not None for out in others)
    return "", f"{errors} of the others got an error" if errors else ""
