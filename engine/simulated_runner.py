"""A model runner without model and device. Its clock shows virtual time, not the machine's time."""

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

STEP_SECONDS = 0.01  # default duration of a step, about as long as a small model takes on a CPU


@dataclass(slots=True)
class SimulatedRequest:
    """A running request."""

    new: NewRequest
    tokens: list[int]  # ids of the prompt and of the output so far
    failed: bool = False  # whether the request's rows get an error; set by subclasses


@dataclass(slots=True, eq=False)
class _Handle(StepHandle):
    """The `StepHandle` of a step that ends at the virtual time `answer.ended_at`."""

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
    alone, not on the machine. If the option `model_runner` is a function that makes this runner,
    also set the option `pipeline_depth`, whose default depends on whether the machine has a GPU.

    A hash of a request's seed and a token's position gives the token's id. A decode row of n
    positions (the last token and n - 1 drafts) gives 1 to n new tokens. A hash of seed, position
    and n gives the number of new tokens. All tokens have equal log-probabilities.

    Args:
        checkpoint: only its vocabulary size is used; without a checkpoint the size is 50.
        groups: shapes of the cache groups; by default one group, whose size `config` determines.
        seconds: function that returns the duration of a plan's step; by default `STEP_SECONDS`.

    Raises a ConfigError for tensor_parallel_size > 1, and if a duration is negative or not finite.
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
            # This module must load without torch, but `memory.sizing` imports torch.
            from memory.sizing import kv_blocks

            block = KVGeometry(1, 1, 1, config.kvcache_block_size, 1, dtype_bytes=4)
            groups = kv_blocks(config, (block,))
        self._groups = groups
        # A token is a hash of its request alone. A subclass may compute something else.
        self.exact = type(self).exact or type(self) is SimulatedRunner
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
        """Return a list with the token drawn after a chunk, or an empty list if none is drawn."""
        return [self._next(self._requests[chunk.slot])] if chunk.samples else []

    def _decode(self, slot: int, count: int) -> list[int]:
        """Return 1 to `count` new tokens for the request in a slot."""
        request = self._requests[slot]
        seed, position = request.new.seed, len(request.tokens)
        most = min(count, request.new.max_total_tokens - position)
        # A hash of integers is the same in all processes: Python salts only hashes of str, bytes.
        return [self._next(request) for _ in range(1 + hash((seed, position, most)) % most)]

    def _next(self, request: SimulatedRequest) -> int:
        """Draw a token, append the token to `request.tokens`, and return it. Obeys `min_tokens`."""
        drawn, new, size = self._draw(request), request.new, self._vocab_size
        num_output = len(request.tokens) - len(new.token_ids) + new.num_output_tokens
        withheld = new.withheld_token_ids if num_output < new.sampling.min_tokens else ()
        choices = ((drawn + i) % size for i in range(size))
        request.tokens.append(next((c for c in choices if c not in withheld), drawn))
        return request.tokens[-1]

    def _draw(self, request: SimulatedRequest) -> int:
        return hash((request.new.seed, len(request.tokens))) % self._vocab_size

    def _reports(self, outputs: list[list[int]]) -> dict[int, RowReport]:
        return {}

    def _prompt_part(self, chunk: PrefillChunk) -> tuple[Sequence[int], int | None]:
        """Return the prompt tokens after a chunk's positions, and the option `prompt_logprobs`."""
        new = self._requests[chunk.slot].new
        end = min(chunk.start + 1 + chunk.num_tokens, len(new.token_ids) - new.num_output_tokens)
        first = max(chunk.start + 1, new.sampling.prompt_logprobs_start)
        return new.token_ids[first:end], new.sampling.prompt_logprobs

    def _logprobs(
        self, rows: list[tuple[Sequence[int], int | None]]
    ) -> list[list[TokenLogprobs]] | None:
        """Return log-probabilities of each row's tokens and of the requested likeliest tokens."""
        if all(num_top is None for _, num_top in rows):
            return None  # no request asks for log-probabilities
        even = -math.log(self._vocab_size)
        # All tokens are equally likely. The tokens with the lowest ids count as the likeliest.
        return [
            [] if top is None else [{t: even, **dict.fromkeys(range(top), even)} for t in tokens]
            for tokens, top in rows
        ]
