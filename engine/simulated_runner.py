"""A runner without a device, in virtual time: a step costs what a function says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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

# As in `StepResult`.
Logprobs = list[list[TokenLogprobs]] | None


@dataclass(slots=True)
class SimulatedRequest:
    """A request in its slot.

    Attributes:
        tokens: prompt and output so far.
        failed: its rows report an error; never so in virtual time alone.
    """

    new: NewRequest
    tokens: list[int]
    failed: bool = False


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
        self._requests: dict[int, SimulatedRequest] = {}
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
        self._start(plan)
        outputs = [self._prefill(chunk) for chunk in plan.prefill]
        outputs += map(self._decode, plan.decode, plan.decode_counts)
        tokens = [new for new in outputs if new]
        self._idle_from = max(self._idle_from, self._now) + seconds
        result = StepResult(
            plan.step_id,
            tokens,
            self._idle_from,
            self._logprobs(plan, tokens),
            self._prompt_logprobs(plan),
            device_seconds=seconds if plan.timed else None,
            reports=self._reports(outputs),
        )
        return _Handle(self, result)

    def close(self) -> None:
        self._closed = True

    def _start(self, plan: StepPlan) -> None:
        """Take in what the plan changes."""
        for new in plan.new_requests:
            self._requests[new.slot] = SimulatedRequest(new, list(new.token_ids))

    def _prefill(self, chunk: PrefillChunk) -> list[int]:
        """The new tokens of a chunk."""
        return [self._next(self._requests[chunk.slot])] if chunk.samples else []

    def _decode(self, slot: int, count: int) -> list[int]:
        """The new tokens of a decode row of at most `count` positions."""
        request = self._requests[slot]
        seed, position = request.new.seed, len(request.tokens)
        most = min(count, request.new.max_total_tokens - position)
        # Python hashes tuples of integers alike everywhere; only str and bytes are salted.
        return [self._next(request) for _ in range(1 + hash((seed, position, most)) % most)]

    def _next(self, request: SimulatedRequest) -> int:
        """Give the request the first token from the one drawn on that it may have."""
        drawn, new, size = self._draw(request), request.new, self._vocab_size
        num_prompt = len(new.token_ids) - new.num_output_tokens
        early = len(request.tokens) < num_prompt + new.sampling.min_tokens
        withheld = new.stop_token_ids if early else ()
        choices = ((drawn + i) % size for i in range(size))
        token = next((choice for choice in choices if choice not in withheld), drawn)
        request.tokens.append(token)
        return token

    def _draw(self, request: SimulatedRequest) -> int:
        """A token for the position behind the last one."""
        return hash((request.new.seed, len(request.tokens))) % self._vocab_size

    def _reports(self, outputs: list[list[int]]) -> dict[int, RowReport]:
        """Reports of rows with these new tokens, by the row's index."""
        return {}

    def _logprobs(self, plan: StepPlan, tokens: list[list[int]]) -> Logprobs:
        asked = [self._requests[slot].new.sampling.logprobs for slot in plan.sampled_slots]
        return self._uniform(tokens, asked)

    def _prompt_logprobs(self, plan: StepPlan) -> Logprobs:
        tokens: list[Sequence[int]] = []
        asked = []
        for chunk in plan.prefill:
            new = self._requests[chunk.slot].new
            end = len(new.token_ids) - new.num_output_tokens
            tokens.append(new.token_ids[:end][chunk.start + 1 :][: chunk.num_tokens])
            asked.append(new.sampling.prompt_logprobs)
        return self._uniform(tokens, asked)

    def _uniform(self, rows: Iterable[Sequence[int]], asked: list[int | None]) -> Logprobs:
        """Log-probabilities of each row's tokens; `asked` tells how many top ones, None for none."""
        if all(num_top is None for num_top in asked):
            return None
        even = -math.log(self._vocab_size)
        # All are equally likely: the lowest ids come first.
        return [
            [{t: even, **dict.fromkeys(range(num_top), even)} for t in tokens]
            if num_top is not None
            else []
            for tokens, num_top in zip(rows, asked, strict=True)
        ]


def _geometry_of(config: Config) -> KVGeometry:
    """A cache of entries of 8 bytes, sized as a real one."""
    # Here, because it brings torch along.
    from memory.kv_cache import kv_blocks

    return kv_blocks(config, KVGeometry(1, 1, 1, config.kvcache_block_size, 1, dtype_bytes=4))
