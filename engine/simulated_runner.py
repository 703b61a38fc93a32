"""A runner without a device, in virtual time: a step costs what a function says."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from config import Config
from engine.types import (
    KVGeometry,
    ModelRunner,
    NewRequest,
    PrefillChunk,
    RowReport,
    StepHandle,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from utils.errors import ConfigError, EngineClosedError

if TYPE_CHECKING:
    from utils.checkpoint import Checkpoint

# Seconds of a step if nothing else is asked for: about one of a small model on a CPU.
STEP_SECONDS = 0.01


@dataclass(slots=True)
class _Request:
    """A request in its slot; `num_tokens` counts its prompt and output so far."""

    new: NewRequest
    num_tokens: int


@dataclass(slots=True)
class Outputs:
    """What a step's rows give, as in `StepResult`."""

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs]] | None = None
    prompt_logprobs: list[list[TokenLogprobs]] | None = None
    reports: dict[int, RowReport] = field(default_factory=dict)


class _Handle(StepHandle):
    """A step whose result is there at a moment of virtual time."""

    def __init__(self, runner: SimulatedRunner, result: StepResult) -> None:
        self._runner = runner
        self._result = result

    def result(self) -> StepResult:
        self._runner.wait_until(self._result.ended_at)
        return self._result

    def done(self) -> bool:
        return self._runner.now() >= self._result.ended_at


class SimulatedRunner(ModelRunner):
    """Runs plans in virtual time: `LLM(path, model_runner="simulated")`.

    Time moves only when someone waits for a result or calls `wait_until`. Planning takes no time.
    The device computes one step at a time. So a run depends on nothing but its requests and
    options: how busy the machine is changes no plan and no reported time, nor do its devices. A
    function that makes the runner does not tell that there is no device: give `pipeline_depth` too.

    A token is a function of its request's seed and its position. The number of positions that a
    decode row keeps is drawn evenly from 1 to the most that it may compute, by seed, position and
    that number. Log-probabilities are those of a uniform distribution.

    Args:
        config: for the size of the cache.
        checkpoint: for the vocabulary's size, which is 50 without one.
        groups: the cache groups. If None, one group sized by the config, whose max_model_len must
            be set.
        seconds: how long the device takes for a plan; `STEP_SECONDS` for each by default.

    Raises:
        ConfigError: tensor_parallel_size is above 1; from `execute`, `seconds` gives no number of
            seconds.
    """

    name = "simulated"
    drafts = True
    has_device = False

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint | None = None,
        *,
        groups: tuple[KVGeometry, ...] | None = None,
        seconds: Callable[[StepPlan], float] = lambda plan: STEP_SECONDS,
    ) -> None:
        if config.tensor_parallel_size != 1:
            raise ConfigError(
                "tensor_parallel_size", config.tensor_parallel_size, "there is no device", "Use 1."
            )
        self._groups = groups or (_geometry_of(config),)
        self._vocab_size = int(checkpoint.hf_config.vocab_size) if checkpoint else 50
        self._seconds = seconds
        self._requests: dict[int, _Request] = {}
        self._now = self._idle_from = 0.0
        self._closed = False

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        return self._groups

    def now(self) -> float:
        return self._now

    def wait_until(self, moment: float) -> None:
        """Move virtual time to `moment`, if it is not there already."""
        self._now = max(self._now, moment)

    def execute(self, plan: StepPlan) -> StepHandle:
        if self._closed:
            raise EngineClosedError("execute() after close()")
        seconds = self._seconds(plan)
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise ConfigError(
                "seconds",
                seconds,
                f"is what step {plan.step_id} is said to take",
                "Return a number of seconds, 0 or more.",
            )
        outputs = self._outputs(plan)
        self._idle_from = max(self._idle_from, self._now) + seconds
        result = StepResult(
            plan.step_id,
            outputs.tokens,
            self._idle_from,
            outputs.logprobs,
            outputs.prompt_logprobs,
            device_seconds=seconds if plan.timed else None,
            reports=outputs.reports,
        )
        return _Handle(self, result)

    def close(self) -> None:
        self._closed = True

    def _outputs(self, plan: StepPlan) -> Outputs:
        """What the plan's rows give; its changes are taken in."""
        for new in plan.new_requests:
            self._requests[new.slot] = _Request(new, len(new.token_ids))
        tokens = [
            self._next(self._requests[chunk.slot], 1) for chunk in plan.prefill if chunk.samples
        ]
        for slot, count in zip(plan.decode, plan.decode_counts, strict=True):
            request = self._requests[slot]
            new, position = request.new, request.num_tokens
            most = min(count, new.max_total_tokens - position)
            tokens.append(self._next(request, num_kept(new.seed, position, most)))
        return self._scored(plan, tokens, {s: r.new for s, r in self._requests.items()})

    def _next(self, request: _Request, count: int) -> list[int]:
        new, start = request.new, request.num_tokens
        request.num_tokens += count
        drawn = [
            (place, hash((new.seed, place)) % self._vocab_size)
            for place in range(start, request.num_tokens)
        ]
        return [allowed(token, self._vocab_size, new, place) for place, token in drawn]

    def _scored(
        self, plan: StepPlan, tokens: list[list[int]], requests: Mapping[int, NewRequest]
    ) -> Outputs:
        """The tokens, with log-probabilities for who asked for them."""
        outputs = Outputs(tokens)
        wanted = [requests[slot].sampling.logprobs for slot in plan.sampled_slots]
        if any(num_top is not None for num_top in wanted):
            outputs.logprobs = [
                [] if num_top is None else [self._logprobs(token, num_top) for token in row]
                for num_top, row in zip(wanted, tokens, strict=True)
            ]
        chunks = [(chunk, requests[chunk.slot]) for chunk in plan.prefill]
        if any(new.sampling.prompt_logprobs is not None for _, new in chunks):
            outputs.prompt_logprobs = [self._of_prompt(chunk, new) for chunk, new in chunks]
        return outputs

    def _of_prompt(self, chunk: PrefillChunk, new: NewRequest) -> list[TokenLogprobs]:
        num_top = new.sampling.prompt_logprobs
        num_prompt = len(new.token_ids) - new.num_output_tokens
        end = min(chunk.start + chunk.num_tokens + 1, num_prompt)
        known = new.token_ids[chunk.start + 1 : end]
        return [] if num_top is None else [self._logprobs(token, num_top) for token in known]

    def _logprobs(self, token: int, num_top: int) -> TokenLogprobs:
        even = -math.log(self._vocab_size)
        # All are equally likely: the lowest ids come first.
        return {token: even, **dict.fromkeys(range(num_top), even)}


def allowed(token: int, vocab_size: int, new: NewRequest, position: int) -> int:
    """The first token from `token` on that the request may have at a position.

    Before its `min_tokens` those of `NewRequest.withheld_token_ids` are not chosen.
    """
    num_prompt = len(new.token_ids) - new.num_output_tokens
    withheld: Collection[int] = ()
    if position < num_prompt + new.sampling.min_tokens:
        withheld = new.withheld_token_ids
    choices = ((token + i) % vocab_size for i in range(vocab_size))
    return next((choice for choice in choices if choice not in withheld), token)


def num_kept(seed: int, position: int, most: int) -> int:
    """How many of `most` positions a decode row keeps; at least 1."""
    # Python hashes tuples of integers alike everywhere; only str and bytes are salted.
    return 1 + hash((seed, position, most)) % most


def _geometry_of(config: Config) -> KVGeometry:
    """A cache of entries of 8 bytes, sized as a real one."""
    # Here, because it brings torch along.
    from memory.kv_cache import kv_blocks

    return kv_blocks(config, KVGeometry(1, 1, 1, config.kvcache_block_size, 1, dtype_bytes=4))
