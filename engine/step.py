"""Plan and result of a step: frozen, picklable dataclasses without tensors.

`engine.types` defines slot, position, block, cache group and row, and re-exports these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from sampling_params import SamplingParams
from utils.errors import ContractError

# Token id -> log-probability at one position: first the position's token, then the likeliest ones.
TokenLogprobs = dict[int, float]

# `max_total_tokens` of a request that has no length limit.
NO_LIMIT = 2**31 - 1


class SeedKind(IntEnum):
    """Where a request's seed comes from. Equal seeds of different kinds may give unequal noise."""

    DERIVED = 0  # computed from the engine's seed and the order of arrival
    GIVEN = 1  # set by the user


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that gets a slot. Later plans name the request only by the slot."""

    slot: int
    request_id: int
    token_ids: tuple[int, ...]  # the prompt and, after a preemption, the output so far
    sampling: SamplingParams
    seed: int  # key of the sampling noise, 0 <= seed < 2**63
    num_output_tokens: int = 0  # how many of `token_ids` are output
    withheld_token_ids: tuple[int, ...] = ()  # banned from the first `min_tokens` output tokens
    max_total_tokens: int = NO_LIMIT  # the runner keeps no token beyond this total length
    # A runner may let noise depend on `sample` and `seed_kind`. The shipped runners do not.
    sample: int = 0  # index of this output among those of its prompt
    seed_kind: SeedKind = SeedKind.DERIVED


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """Write `block_ids` to entries `first_index`, `first_index + 1`, ... of a slot's block table.

    When a block leaves a slot's sliding window, the block may go to another request without a
    BlockUpdate for the slot. So the runner must not read positions before `CacheKind.first_read`.
    """

    slot: int
    first_index: int
    block_ids: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy the KV of block `source` to block `target`, in every layer of the cache group."""

    source: int
    target: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute positions [start, start + num_tokens) of a slot. Earlier positions are in the cache.

    If `samples` is True, the runner samples the next token after the chunk. `samples` is True if
    the chunk ends with the request's last known token and the length limit allows another token.
    """

    slot: int
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the model, as pure data: updates of the runner's tables, and rows to compute.

    A runner applies `new_requests`, then `block_updates`, and before or after these `block_copies`.
    Last it computes the rows: prefill chunks in order, then a decode row for each slot in `decode`.

    A decode row starts at the request's first position that is not computed. The runner sampled the
    token of this position in an earlier step. Decode row i has up to `decode_tokens[i]` positions.
    The runner drafts the tokens of all positions after the first. A drafted token is accepted if
    all drafts before it in the row are accepted, and sampling gives the same token at its position.
    The runner ends a row before position `max_total_tokens - 1`, for which no block is reserved.
    """

    step_id: int  # 0, 1, 2, ... in order of planning; starts at 0 again after an exception
    new_requests: tuple[NewRequest, ...] = ()
    block_updates: tuple[BlockUpdate, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[int, ...] = ()
    # The copies can be made in any order: targets are distinct, and no target is a source. Sources
    # were written by earlier steps, and may be overwritten by later steps.
    block_copies: tuple[BlockCopy, ...] = ()
    decode_tokens: tuple[int, ...] = ()  # maximum positions of each decode row; if empty, 1 each
    # For each cache group: blocks to fill with NaN before the step; only with `kv_sanitizer=True`.
    poisoned_blocks: tuple[tuple[int, ...], ...] = ()
    timed: bool = False  # whether the result must have `device_seconds`

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens computed by prefill chunks, including recomputation after a preemption."""
        return sum(chunk.num_tokens for chunk in self.prefill)

    @property
    def num_tokens(self) -> int:
        """Maximum number of positions that the step computes; at most the token budget."""
        return self.num_prefill_tokens + sum(self.decode_counts)

    @property
    def decode_counts(self) -> tuple[int, ...]:
        """Maximum positions of each decode row: `decode_tokens`, or 1 for each if it is empty."""
        return self.decode_tokens or (1,) * len(self.decode)

    @property
    def row_slots(self) -> list[int]:
        """The slot of each row: slots of the prefill chunks, then slots of the decode rows."""
        return [chunk.slot for chunk in self.prefill] + list(self.decode)

    @property
    def sampled_slots(self) -> list[int]:
        """The slots that get new tokens, in the order of the lists in `StepResult.tokens`."""
        return [chunk.slot for chunk in self.prefill if chunk.samples] + list(self.decode)


@dataclass(frozen=True, slots=True)
class RowReport:
    """What a row reports in addition to its tokens."""

    # An error ends the request with finish_reason "error", and the row's tokens are dropped.
    error: Exception | None = None
    # Named results that the runner chooses to report, e.g. hidden states: one mapping for each new
    # token of the row. A prompt's last chunk may report one mapping even if it samples no token.
    values: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced."""

    step_id: int
    # New tokens: one list for each of the plan's `sampled_slots`. A chunk's list has one token. The
    # list of a decode row has a token for each accepted position, but none beyond the length limit.
    tokens: list[list[int]]
    ended_at: float  # time on the runner's clock when the host saw that the step had ended
    # For each list of `tokens`, a list of log-probabilities; an empty list if the request asked for
    # no log-probabilities. `logprobs` is None if no request of the step asked for any.
    logprobs: list[list[TokenLogprobs]] | None = None
    # For each of the plan's chunks, log-probabilities of the prompt tokens at start + 1, start + 2,
    # ..., which the chunk predicts. Empty lists and None mean what they mean in `logprobs`.
    prompt_logprobs: list[list[TokenLogprobs]] | None = None
    device_seconds: float | None = None  # how long the device worked, if the plan is `timed`
    # Row's index in `StepPlan.row_slots` -> report of the row. Most rows have no report.
    reports: Mapping[int, RowReport] = field(default_factory=dict)

    def check(self, plan: StepPlan) -> None:
        """Raise a ContractError if step id or number of tokens, logprobs or values is wrong."""
        lengths = list(map(len, self.tokens))
        sampling = [row for row, chunk in enumerate(plan.prefill) if chunk.samples]
        num_rows = len(sampling) + len(plan.decode)
        num_scores = num_rows if self.logprobs is None else len(self.logprobs)
        num_chunks = len(plan.prefill if self.prompt_logprobs is None else self.prompt_logprobs)
        found = self.step_id, len(lengths), num_scores, num_chunks
        expected = plan.step_id, num_rows, num_rows, len(plan.prefill)
        if found != expected:
            names = "step, rows with tokens, rows with log-probabilities, chunks"
            raise ContractError(f"a result has {found} instead of {expected} ({names})")
        # Fast path: in most steps every row has one token, no log-probabilities and no report.
        plain = self.logprobs is None and not self.reports and not plan.decode_tokens
        if plain and lengths.count(1) == num_rows:
            return
        rows = [*sampling, *range(len(plan.prefill), len(plan.row_slots))]
        counts = [*([1] * len(sampling)), *plan.decode_counts]
        scores = self.logprobs or [[]] * num_rows
        for row, count, length, scored in zip(rows, counts, lengths, scores, strict=True):
            report = self.reports.get(row, RowReport())
            others = {len(scored), len(report.values)} - {0, length}
            if report.error is None and (others or not 1 <= length <= count):
                raise ContractError(
                    f"step {plan.step_id}, row {row}: {length} tokens of {count} positions at "
                    f"most, {len(scored)} log-probabilities and {len(report.values)} values"
                )
