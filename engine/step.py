"""Plan and result of a step. They are frozen, picklable and contain no tensors.

`engine.types` defines slot, position, block, cache group and row, and exports these classes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from sampling_params import SamplingParams
from utils.errors import ContractError

# Token id -> log-probability at one position: the position's token first, then the most likely.
TokenLogprobs = dict[int, float]

# `max_total_tokens` of a request that has no length limit.
NO_LIMIT = 2**31 - 1


class SeedKind(IntEnum):
    """Where a request's seed comes from. Equal seeds of different kinds may give unequal noise."""

    DERIVED = 0  # computed from the engine's seed and the order of arrival
    GIVEN = 1  # set by the user


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that enters a slot. Later plans name only the slot."""

    slot: int
    request_id: int
    token_ids: tuple[int, ...]  # the prompt and, after a preemption, the output so far
    sampling: SamplingParams
    seed: int  # key of the sampling noise, 0 <= seed < 2**63
    num_output_tokens: int = 0  # how many of `token_ids` are output
    withheld_token_ids: tuple[int, ...] = ()  # stop tokens, banned for `min_tokens` output tokens
    max_total_tokens: int = NO_LIMIT  # the runner keeps no token beyond this total length
    # A runner may let noise depend on `sample` and `seed_kind`. The shipped runners do not.
    sample: int = 0  # index of this output among those of its prompt
    seed_kind: SeedKind = SeedKind.DERIVED


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """Write `block_ids` to entries `first_index`, `first_index + 1`, ... of a slot's block table.

    No BlockUpdate tells the runner that a block left a slot's window and went to another request.
    So the runner must not read positions before `first_read` of the cache group's `CacheKind`.
    """

    slot: int
    first_index: int
    block_ids: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy all positions of block `source` to block `target`, in every layer of the group."""

    source: int
    target: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute positions [start, start + num_tokens) of a slot. Earlier positions are in the cache.

    `samples` is True if the chunk ends at the request's last known token, and the length limit
    allows one more token. The runner then samples this token.
    """

    slot: int
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the model, as pure data: what changed, then what to compute.

    A runner applies `new_requests`, then `block_updates`, then makes the `block_copies`, then
    computes the rows: the prefill chunks in order, then one row for each slot in `decode`.

    A decode row starts at the request's first position that is not computed. The runner sampled the
    token of this position in an earlier step. Row i computes up to `decode_tokens[i]` positions.
    The runner drafts the tokens of all positions after the first. It keeps (accepts) a position if
    every drafted token up to the position equals the token that sampling would have given there.
    The runner cuts a row before position `max_total_tokens - 1`, which has no reserved block.
    """

    step_id: int  # 0, 1, 2, ... in order of planning; starts at 0 again after an exception
    new_requests: tuple[NewRequest, ...] = ()
    block_updates: tuple[BlockUpdate, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[int, ...] = ()
    # The copies can be made in any order: targets are distinct, and no target is a source. Sources
    # were written by earlier steps, and may be overwritten by later steps.
    block_copies: tuple[BlockCopy, ...] = ()
    decode_tokens: tuple[int, ...] = ()  # most positions (>= 1) of each decode row; empty: 1 each
    # For each cache group, blocks to fill with NaN before the step. Only the KV sanitizer uses it.
    poisoned_blocks: tuple[tuple[int, ...], ...] = ()
    timed: bool = False  # whether the result must have `device_seconds`

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens computed by prefill chunks, including recomputation after a preemption."""
        return sum(chunk.num_tokens for chunk in self.prefill)

    @property
    def num_tokens(self) -> int:
        """Most positions that this step may compute. The token budget limits this number."""
        return self.num_prefill_tokens + sum(self.decode_counts)

    @property
    def decode_counts(self) -> tuple[int, ...]:
        """`decode_tokens`, or a 1 for each decode row if `decode_tokens` is empty."""
        return self.decode_tokens or (1,) * len(self.decode)

    @property
    def row_slots(self) -> list[int]:
        """The slot of each row: first of the prefill chunks, then of the decode rows."""
        return [chunk.slot for chunk in self.prefill] + list(self.decode)

    @property
    def sampled_slots(self) -> list[int]:
        """Slots that get new tokens, in the order of `StepResult.tokens`."""
        return [chunk.slot for chunk in self.prefill if chunk.samples] + list(self.decode)


@dataclass(frozen=True, slots=True)
class RowReport:
    """What a row reports in addition to its tokens."""

    # An error ends the request with finish_reason "error", and the row's tokens are dropped.
    error: Exception | None = None
    # Named results that the runner chooses to report, e.g. hidden states. There is one mapping for
    # each of the row's tokens. A prompt's last chunk that samples nothing may have one mapping.
    values: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced."""

    step_id: int
    # New tokens: one list for each of the plan's `sampled_slots`. A chunk has one token. A decode
    # row has one for each position kept: at least 1, and none beyond the length limit.
    tokens: list[list[int]]
    ended_at: float  # time on the runner's clock when the host saw that the step had ended
    # Log-probabilities for each list of `tokens`. The list is empty if the request did not ask for
    # them; None if no request of the step did.
    logprobs: list[list[TokenLogprobs]] | None = None
    # For each of the plan's chunks, log-probabilities of the prompt tokens at start + 1, start + 2,
    # ..., which the chunk predicts. Empty lists and None mean what they mean in `logprobs`.
    prompt_logprobs: list[list[TokenLogprobs]] | None = None
    device_seconds: float | None = None  # how long the device worked, if the plan is `timed`
    # Reports by the row's index in `StepPlan.row_slots`. Most rows have none.
    reports: Mapping[int, RowReport] = field(default_factory=dict)

    def check(self, plan: StepPlan) -> None:
        """Raise a ContractError if rows or tokens of the result are missing or too many."""
        lengths = list(map(len, self.tokens))
        sampling = [row for row, chunk in enumerate(plan.prefill) if chunk.samples]
        num_rows = len(sampling) + len(plan.decode)
        num_scores = num_rows if self.logprobs is None else len(self.logprobs)
        if self.step_id != plan.step_id or not len(lengths) == num_scores == num_rows:
            found = f"with tokens of {len(lengths)} and log-probabilities of {num_scores}"
            raise ContractError(
                f"step {plan.step_id} has {num_rows} rows that sample; its result is of step "
                f"{self.step_id}, {found}"
            )
        # Fast path: most steps have one token a row and nothing else.
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
