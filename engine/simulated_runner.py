"""A runner without model and device. A function says how much virtual time a step takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from config import Config
from engine.step import NewRequest, PrefillChunk, RowReport, StepPlan, StepResult, TokenLogprobs
from engine.types import KVGeometry, ModelRunner, StepHandle
from utils.errors import ConfigError, EngineClosedError

if TYPE_CHECKING:
    from utils.checkpoint import Checkpoint

# Seconds that a step takes by default: about as long as a step of a small model on a CPU.
STEP_SECONDS = 0.01


@dataclass(slots=True)
class SimulatedRequest:
    """A running request."""

    new: NewRequest
    tokens: list[int]  # prompt and output so far
    failed: bool = False  # the request's rows report an error; set only by `FakeRunner`


@dataclass(slots=True, eq=False)
class _Handle(StepHandle):
    """Handle of a step that ends at a moment of virtual time."""

    runner: SimulatedRunner
    answer: StepResult

    def result(self) -> StepResult:
        self.runner.wait_until(self.answer.ended_at)
        return self.answer

    def done(self) -> bool:
        return self.runner.now() >= self.answer.ended_at


class SimulatedRunner(ModelRunner):
    """Runs plans in virtual time; `LLM(path, model_runner="simulated")` selects this runner.

    Virtual time moves only when the caller waits for a result or calls `wait_until`. Planning takes
    no virtual time, and steps run one after the other. So a run depends on its requests and options
    alone, not on the machine. If `model_runner` is a function, also set `pipeline_depth`, whose
    default would depend on the machine, because the engine cannot ask a function for `has_device`.

    A token depends on its request's seed and its position. With speculative decoding a decode row
    has n positions and gives 1 to n tokens; a hash of seed, position and n says how many. All
    tokens are equally likely.

    Args:
        checkpoint: gives the vocabulary's size; without a checkpoint the size is 50.
        groups: the cache groups; by default one, whose size follows from `config`.
        seconds: function from a plan to the time that the step takes; by default `STEP_SECONDS`.

    Raises a ConfigError if tensor_parallel_size is above 1, and in `execute` for an invalid time.
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
            # Imported here because memory.kv_cache imports torch.
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
        """Move virtual time forward to `moment`, unless `moment` has passed already."""
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
        scores = self._logprobs(list(zip(tokens, asked, strict=True)))
        prompt_scores = self._logprobs([self._prompt_part(chunk) for chunk in plan.prefill])
        others = scores, prompt_scores, seconds if plan.timed else None, self._reports(outputs)
        return _Handle(self, StepResult(plan.step_id, tokens, self._idle_from, *others))

    def close(self) -> None:
        self._closed = True

    def _start(self, plan: StepPlan) -> None:
        for new in plan.new_requests:
            self._requests[new.slot] = SimulatedRequest(new, list(new.token_ids))

    def _prefill(self, chunk: PrefillChunk) -> list[int]:
        """The token that is drawn after a chunk, in a list; empty if the plan wants no token."""
        return [self._next(self._requests[chunk.slot])] if chunk.samples else []

    def _decode(self, slot: int, count: int) -> list[int]:
        """The new tokens of a decode row."""
        request = self._requests[slot]
        seed, position = request.new.seed, len(request.tokens)
        most = min(count, request.new.max_total_tokens - position)
        # The hash is the same in every process: Python salts only the hashes of str and bytes.
        return [self._next(request) for _ in range(1 + hash((seed, position, most)) % most)]

    def _next(self, request: SimulatedRequest) -> int:
        """Append a drawn token; if `min_tokens` forbids the token, the next allowed id instead."""
        drawn, new, size = self._draw(request), request.new, self._vocab_size
        num_output = len(request.tokens) - len(new.token_ids) + new.num_output_tokens
        withheld = new.withheld_token_ids if num_output < new.sampling.min_tokens else ()
        choices = ((drawn + i) % size for i in range(size))
        request.tokens.append(next((c for c in choices if c not in withheld), drawn))
        return request.tokens[-1]

    def _draw(self, request: SimulatedRequest) -> int:
        """A token for the next position of the request."""
        return hash((request.new.seed, len(request.tokens))) % self._vocab_size

    def _reports(self, outputs: list[list[int]]) -> dict[int, RowReport]:
        """Reports of rows for `StepResult`: none here; `FakeRunner` makes some from `outputs`."""
        return {}

    def _prompt_part(self, chunk: PrefillChunk) -> tuple[Sequence[int], int | None]:
        """The next prompt token of each position in the chunk, and the `prompt_logprobs` option."""
        new = self._requests[chunk.slot].new
        end = min(chunk.start + 1 + chunk.num_tokens, len(new.token_ids) - new.num_output_tokens)
        return new.token_ids[chunk.start + 1 : end], new.sampling.prompt_logprobs

    def _logprobs(
        self, rows: list[tuple[Sequence[int], int | None]]
    ) -> list[list[TokenLogprobs]] | None:
        """Log-probabilities of rows (tokens, number of likeliest tokens); None if no row asks."""
        if all(num_top is None for _, num_top in rows):
            return None
        even = -math.log(self._vocab_size)
        # All tokens are equally likely, so the lowest ids count as the most likely ones.
        return [
            [] if top is None else [{t: even, **dict.fromkeys(range(top), even)} for t in tokens]
            for tokens, top in rows
        ]
