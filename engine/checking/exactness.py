"""The test that `check_exact=True` runs at start: are a request's bits the same in any company?

A *probe* is a request of the test. Each probe runs alone first. Then the probes run again in
settings that could change their bits: beside other requests, in chunks, after a prefix hit. The
plans come from the scheduler and the block manager that the options choose, and the engine's runner
executes them. So parts of the user are tested as they will be used. The test adds no request to the
engine itself, so it changes neither request ids nor statistics nor the seeds of later requests.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, zip_longest
from typing import TYPE_CHECKING, Any

from engine.requests import Sequence
from engine.step import SeedKind, StepPlan, TokenLogprobs
from engine.types import Scheduler, StepHandle
from sampling_params import SamplingParams
from utils.errors import ConfigError, RequestError, StepError, shown

if TYPE_CHECKING:
    from engine.llm_engine import LLMEngine

# Prompt lengths of probes. The prompt of a further probe fills exactly one KV block.
_LENGTHS = (1, 17, 130, 1000)
# Output tokens of a probe: the first one comes from a prefill, the others come from decodes.
_NUM_TOKENS = 6
# Tokens of a prefill, and requests of a decode, as far as the engine's options allow.
_PREFILL = 4096
_DECODES = (16, 64, 256)
# Tokens of a chunk: no multiple of 64, because kernels cut contexts at multiples of 64 or 128.
_CHUNK = 48
# With a small max_num_batched_tokens, the prompts of a decode take many steps. Other requests go on
# for at most this number of steps, until all requests decode together.
_MOST_STEPS = 64
# What probes ask for, in turn. Log-probabilities show lost bits that change no token.
_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 1},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 0},
)
# What two further probes ask for, by the lengths of their prompts. The logits of a long prompt
# would take much memory. Without log-probabilities a token may come from a CUDA graph.
_FURTHER: tuple[tuple[int, dict[str, Any]], ...] = (
    (17, {"temperature": 0.0, "prompt_logprobs": 0}),
    (130, {"temperature": 1.0}),
)
_FIX = (
    "Set check_exact=False, or use parts that keep all bits. The engine's own runner and attention "
    "keep them on Hopper GPUs in bfloat16 and float16 (docs/exact.md)."
)


def check_exact(engine: LLMEngine) -> None:
    """Test an engine that has no requests. Afterwards it has a new scheduler and block manager.

    A setting that the options do not allow is left out, such as a decode of 16 requests if
    max_num_seqs is 4. The test ends at the first loss.

    Raises:
        ConfigError: a probe got other bits than alone, or failed.
        StepError: a step failed, or the scheduler planned none.
    """
    test = _Test(engine)
    alone = [test.alone(probe) for probe in test.probes]
    if not any(answer.bits for answer in alone):
        raise ConfigError("check_exact", True, "the scheduler takes no request of the test", _FIX)
    for name, indices, answers in test.settings():
        lost = [
            (place, index, answer)
            for index, answer in zip(indices, answers, strict=True)
            if not answer.refused and (place := _first_difference(alone[index], answer)) is not None
        ]
        if lost:
            place, index, answer = min(lost, key=lambda one: one[0])
            length = len(test.probes[index].prompt)
            victim = f"output token {place + 1} of a request with prompt length {length}"
            problem = f"{name or answer.steps[place]} changes the bits of {victim}"
            raise ConfigError("check_exact", True, problem, _FIX) from answer.seq.error
    engine.reset()


@dataclass(frozen=True, slots=True)
class _Request:
    prompt: list[int]
    params: SamplingParams


@dataclass(slots=True)
class _Answer:
    """What a request got. `bits` is empty if the scheduler refused the request."""

    seq: Sequence
    # The step that gave each output token, in words, and once more the step that ended the request.
    steps: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        return self.seq.finish_reason == "abort"

    def note(self, plan: StepPlan) -> None:
        """Record a step that was committed."""
        ended = self.seq.finish_reason is not None
        num_new = len(self.seq.output_token_ids) - len(self.steps)
        self.steps += [_words(plan)] * (num_new + ended)

    @property
    def bits(self) -> list[str]:
        """For each output token its id and log-probabilities."""
        seq = self.seq
        scores = map(_bits, seq.logprobs)
        bits = [repr(one) for one in zip_longest(seq.output_token_ids, scores)]
        # The prefill that gives the first token also gives the prompt's log-probabilities.
        return [f"{bits[0]} {[*map(_bits, seq.prompt_logprobs)]}", *bits[1:]] if bits else []


# A setting's name, the indices of its probes, and their answers. Without a name, the step that gave
# a token names the setting.
_Setting = tuple[str | None, list[int], list[_Answer]]


class _Test:
    """Runs requests on the runner of `engine`, with a new scheduler for each setting."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._random = random.Random(0)
        self._ids = count()
        blocks, self._budget = engine.blocks, engine.config.max_num_batched_tokens
        longest = engine.config.max_model_len
        assert longest is not None
        # The KV of a request's last token is never written.
        self._most = min(longest, blocks.num_blocks * blocks.block_size + 1)
        num_tokens = min(_NUM_TOKENS, self._most - 1)
        limit = self._most - num_tokens
        lengths = sorted({min(length, limit) for length in (*_LENGTHS, blocks.block_size)})
        kinds = [(length, _KINDS[i % len(_KINDS)]) for i, length in enumerate(lengths)]
        self.probes = [
            self._request(min(length, limit), max_tokens=num_tokens, **kind)
            for length, kind in (*kinds, *_FURTHER)
        ]

    def alone(self, probe: _Request) -> _Answer:
        (answer,) = self._serve(self._scheduler(), [probe])
        if (error := answer.seq.error) is not None:
            problem = f"a request of the test failed ({shown(error)})"
            raise ConfigError("check_exact", True, problem, _FIX) from error
        return answer

    def settings(self) -> Iterator[_Setting]:
        """Run the probes in every setting: first alone, then beside others."""
        for index, probe in enumerate(self.probes):
            yield "a second run of the same request", [index], [self.alone(probe)]
        yield from self._in_chunks()
        yield from self._after_prefixes()
        for index, probe in enumerate(self.probes):
            if others := self._others_in_prefill(len(probe.prompt)):
                answers = self._serve(self._scheduler(), [probe], others)
                # The probe decodes alone, so the prefill is at fault for other bits in a decode.
                yield next(iter(answers[0].steps), None), [index], answers
        limit = self._engine.config.max_num_seqs
        for size in sorted({min(n, limit) for n in (len(self.probes), *_DECODES)} - {1}):
            others = self._others_in_decode(size)
            answers = self._serve(self._scheduler(), self.probes, others)
            yield None, list(range(len(self.probes))), answers

    def _in_chunks(self) -> Iterator[_Setting]:
        size = max(1, min(_CHUNK, self._budget - 1))
        for index, probe in enumerate(self.probes):
            if len(probe.prompt) > size:
                scheduler = self._scheduler(max_num_batched_tokens=size, max_num_seqs=1)
                # A scheduler may compute prompts only as a whole.
                if answers := self._serve(scheduler, [probe], may_idle=True):
                    yield f"a prompt in chunks of {_number(size, 'token')}", [index], answers

    def _after_prefixes(self) -> Iterator[_Setting]:
        for index, probe in enumerate(self.probes):
            if len(probe.prompt) >= self._engine.blocks.block_size:
                scheduler = self._scheduler()
                self._serve(scheduler, [probe])
                answers = self._serve(scheduler, [probe])
                if num_cached := answers[0].seq.num_cached:
                    yield f"a prefix hit of {_number(num_cached, 'token')}", [index], answers

    def _others_in_prefill(self, length: int) -> list[_Request]:
        """Return requests that fill up a prefill in which a probe has `length` tokens."""
        others: list[_Request] = []
        left = min(_PREFILL, self._budget) - length
        most = self._engine.config.max_num_seqs - 1
        while left > 0 and len(others) < most:
            # The last request fills up the prefill, since the engine may run only a few requests.
            size = left // 2 if left > 1 and len(others) + 1 < most else left
            size = min(size, self._most - 1)
            others.append(self._request(size, max_tokens=1, temperature=0.0))
            left -= size
        return others

    def _others_in_decode(self, size: int) -> list[_Request]:
        """Return requests that, with all probes, make a decode of `size` requests."""
        num_others = min(size - len(self.probes), self._engine.blocks.num_blocks)
        lengths = [min(1 + i % 24, self._most - 1) for i in range(num_others)]
        num_prompt = sum(lengths) + sum(len(probe.prompt) for probe in self.probes)
        num_steps = min(_MOST_STEPS, num_prompt // max(1, self._budget - size))
        return [
            self._request(
                length,
                max_tokens=min(_NUM_TOKENS + 1 + num_steps, self._most - length),
                temperature=i % 2 * 0.9,
            )
            for i, length in enumerate(lengths)
        ]

    def _request(self, length: int, **params: Any) -> _Request:
        vocab_size = int(self._engine.checkpoint.hf_config.vocab_size)
        prompt = [self._random.randrange(vocab_size) for _ in range(length)]
        return _Request(prompt, SamplingParams(seed=length, ignore_eos=True, **params))

    def _scheduler(self, **options: int) -> Scheduler:
        """Return a scheduler with an empty prefix cache. `options` override the engine's.

        The engine makes it as for serving, so no two schedulers share a block manager.
        """
        engine, config = self._engine, self._engine.config
        engine.config = replace(config, **options)  # type: ignore[arg-type]
        engine.reset()
        engine.config = config
        return engine.scheduler

    def _serve(
        self,
        scheduler: Scheduler,
        probes: list[_Request],
        others: list[_Request] | tuple[()] = (),
        *,
        may_idle: bool = False,
    ) -> list[_Answer]:
        """Return the answers of `probes`. Half of `others` come before the probes, half after.

        If the scheduler plans nothing, return an empty list or raise a StepError.
        """
        half = len(others) // 2
        entered = [self._enter(scheduler, one) for one in (*others[:half], *probes, *others[half:])]
        answers = entered[half : half + len(probes)]
        runner, depth = self._engine.runner, self._engine.config.pipeline_depth or 0
        pipeline: deque[tuple[StepPlan, StepHandle]] = deque()
        while scheduler.has_unfinished or pipeline:
            while len(pipeline) <= depth and (plan := scheduler.schedule()):
                pipeline.append((plan, runner.execute(plan)))
            if not pipeline:
                if may_idle:
                    return []
                problem = "although requests of the test of check_exact are unfinished"
                raise StepError(f"{type(scheduler).__name__} planned nothing {problem}")
            plan, handle = pipeline.popleft()
            scheduler.commit(plan, handle.result())
            for answer in answers:
                answer.note(plan)
            if all(answer.seq.finish_reason for answer in answers):
                for one in entered:
                    if one.seq.finish_reason is None:
                        scheduler.abort(one.seq.request_id)
        return answers

    def _enter(self, scheduler: Scheduler, request: _Request) -> _Answer:
        params = request.params
        assert params.seed is not None
        seq = Sequence(
            next(self._ids),
            request.prompt,
            params,
            max_total_tokens=len(request.prompt) + (params.max_tokens or 0),
            seed=params.seed,
            seed_kind=SeedKind.GIVEN,
        )
        seq.added_at = self._engine.runner.now()
        try:
            scheduler.add(seq)
        except RequestError:
            seq.finish_reason = "abort"
        return _Answer(seq)


def _words(plan: StepPlan) -> str:
    """Return e.g. "a prefill of 17 tokens beside a decode of 1 request"."""
    kinds = (
        ("prefill", plan.num_prefill_tokens, "token"),
        ("decode", len(plan.decode), "request"),
    )
    return " beside ".join(f"a {kind} of {_number(n, unit)}" for kind, n, unit in kinds if n)


def _number(count: int, unit: str) -> str:
    return f"{count} {unit}{'s' if count > 1 else ''}"


def _bits(scores: TokenLogprobs | None) -> list[tuple[int, str]]:
    """Return all bits of log-probabilities, whatever their order and type of number.

    The first token of a prompt has None.
    """
    return sorted((token, float(value).hex()) for token, value in (scores or {}).items())


def _first_difference(expected: _Answer, found: _Answer) -> int | None:
    """Return the index of the first output token whose bits differ, or None if all are equal."""
    pairs = enumerate(zip_longest(expected.bits, found.bits))
    return next((place for place, (one, other) in pairs if one != other), None)
