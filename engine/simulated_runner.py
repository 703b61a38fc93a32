"""A runner without a device, in virtual time: a step costs what a function says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
        if (size := config.tensor_parallel_size) != 1:
            raise ConfigError("tensor_parallel_size", size, "there is no device", "Use 1.")
        if not groups:
            # Here, because it brings torch along.
            from memory.kv_cache import kv_blocks

            block = KVGeometry(1, 1, 1, config.kvcache_block_size, 1, dtype_bytes=4)
            groups = (kv_blocks(config, block),)
        self._groups = groups
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
            problem = f"is what step {plan.step_id} is said to take"
            raise ConfigError("seconds", seconds, problem, "Return a number of seconds, 0 or more.")
        self._start(plan)
        outputs = [self._prefill(chunk) for chunk in plan.prefill]
        outputs += map(self._decode, plan.decode, plan.decode_counts)
        tokens = [new for new in outputs if new]
        asked = [self._requests[slot].new.sampling.logprobs for slot in plan.sampled_slots]
        self._idle_from = max(self._idle_from, self._now) + seconds
        result = StepResult(
            plan.step_id,
            tokens,
            self._idle_from,
            self._logprobs(list(zip(tokens, asked, strict=True))),
            self._logprobs([self._prompt_part(chunk) for chunk in plan.prefill]),
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
        withheld = new.withheld_token_ids if early else ()
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

    def _prompt_part(self, chunk: PrefillChunk) -> tuple[Sequence[int], int | None]:
        """The prompt's tokens that the chunk predicts, and how many of the likeliest are wanted."""
        new = self._requests[chunk.slot].new
        end = min(chunk.start + 1 + chunk.num_tokens, len(new.token_ids) - new.num_output_tokens)
        return new.token_ids[chunk.start + 1 : end], new.sampling.prompt_logprobs

    def _logprobs(
        self, rows: list[tuple[Sequence[int], int | None]]
    ) -> list[list[TokenLogprobs]] | None:
        """Uniform ones of each row's tokens, beside so many of the likeliest; None: nobody asks."""
        if all(num_top is None for _, num_top in rows):
            return None
        even = -math.log(self._vocab_size)
        scores = []
        for tokens, num_top in rows:
            # All are equally likely: the lowest ids come first.
            likely = dict.fromkeys(range(num_top or 0), even)
            scores.append([{t: even, **likely} for t in tokens if num_top is not None])
        return scores
