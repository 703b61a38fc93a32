"""Values of a step: plan and result, frozen, picklable, without tensors.

`engine.types` explains the vocabulary and exports them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from sampling_params import SamplingParams
from utils.errors import ContractError

# Token id -> log-probability at one position: the token itself first, then the likeliest in order.
TokenLogprobs = dict[int, float]

# The length limit of a request without one.
NO_LIMIT = 2**31 - 1


class SeedKind(IntEnum):
    """Where a request's seed comes from; noise may differ for equal seeds of two kinds."""

    DERIVED = 0  # from the engine's seed and the order of arrival
    GIVEN = 1  # by the user


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request enters a slot; sent once, so that later steps name the slot alone."""

    slot: int
    request_id: int
    token_ids: tuple[int, ...]  # the prompt and, after a preemption, the output so far
    sampling: SamplingParams
    seed: int  # key of the sampling noise, 0 <= seed < 2**63
    num_output_tokens: int = 0  # how many of the tokens are output
    withheld_token_ids: tuple[int, ...] = ()  # not to be sampled before `sampling.min_tokens`
    max_total_tokens: int = NO_LIMIT  # the runner keeps no token beyond this length
    # Noise may depend on these two; that of the shipped runners does not.
    sample: int = 0  # index of this output among those of its prompt
    seed_kind: SeedKind = SeedKind.DERIVED


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """`block_ids` become entries `first_index`, `first_index + 1`, ... of a slot's block table.

    A runner is not told when a block leaves a window and goes to another request: it must not read
    positions before the `first_read` of the kind of its cache group.
    """

    slot: int
    first_index: int
    block_ids: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """All positions of block `source`, in every layer of the group, go to block `target`."""

    source: int
    target: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute positions [start, start + num_tokens) of a slot; earlier ones are in the cache.

    `samples`: the chunk ends at the last known token, and the length limit allows the next one.
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

    A decode row starts at the first position that is not computed, whose token the runner sampled
    in an earlier step. The row may compute up to `decode_tokens[i]` positions. The runner drafts
    the tokens of the further ones, and keeps (accepts) a position if every drafted token up to it
    equals the token that it would have sampled there. It cuts a row before position
    `max_total_tokens - 1`, for which the scheduler reserves no block.
    """

    step_id: int  # 0, 1, 2, ... in order of planning; from 0 again after an exception
    new_requests: tuple[NewRequest, ...] = ()
    block_updates: tuple[BlockUpdate, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[int, ...] = ()
    # In any order; no target is a source or another one's target. What a source holds was written
    # by earlier steps; later ones may write to it.
    block_copies: tuple[BlockCopy, ...] = ()
    decode_tokens: tuple[int, ...] = ()  # for each row of `decode`, at least 1; empty: 1 each
    # For each cache group the blocks to fill with NaN first; only the KV sanitizer sets it.
    poisoned_blocks: tuple[tuple[int, ...], ...] = ()
    timed: bool = False  # the result has to have `device_seconds`

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens computed for prompts (and for recomputation after a preemption)."""
        return sum(chunk.num_tokens for chunk in self.prefill)

    @property
    def num_tokens(self) -> int:
        """Most positions that this step computes; what the token budget counts."""
        return self.num_prefill_tokens + sum(self.decode_counts)

    @property
    def decode_counts(self) -> tuple[int, ...]:
        """`decode_tokens` with every 1 written out."""
        return self.decode_tokens or (1,) * len(self.decode)

    @property
    def row_slots(self) -> list[int]:
        """The slot of each row: those of the prefill chunks, then those of the decodes."""
        return [chunk.slot for chunk in self.prefill] + list(self.decode)

    @property
    def sampled_slots(self) -> list[int]:
        """Slots that get new tokens, in the order of `StepResult.tokens`."""
        return [chunk.slot for chunk in self.prefill if chunk.samples] + list(self.decode)


@dataclass(frozen=True, slots=True)
class RowReport:
    """What a row has beside its tokens."""

    # Why the request ends, with finish_reason "error" and without the row's tokens.
    error: Exception | None = None
    # Results by name that the runner decides to report, e.g. hidden states: one entry for each of
    # the row's tokens, one for a last chunk that samples nothing.
    values: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced."""

    step_id: int
    # For each of the plan's `sampled_slots`: one token for a chunk, for a decode row one for each
    # position kept, at least one and never beyond the request's length limit.
    tokens: list[list[int]]
    ended_at: float  # on the runner's clock: when the host could read the result, or had waited
    # For each of `tokens`; empty lists for requests that did not ask, None if no request did.
    logprobs: list[list[TokenLogprobs]] | None = None
    # For each of the plan's chunks, those of the prompt's tokens at start + 1, start + 2, ...,
    # which the chunk's positions predict; else as `logprobs`.
    prompt_logprobs: list[list[TokenLogprobs]] | None = None
    device_seconds: float | None = None  # of the device's work, if the plan is `timed`
    # Of rows that have one, by the row's index in `StepPlan.row_slots`.
    reports: Mapping[int, RowReport] = field(default_factory=dict)

    def check(self, plan: StepPlan) -> None:
        """Refuse, by a ContractError, a result with rows or tokens that are missing or too many."""
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
        # Most steps: one token a row, and nothing else.
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
