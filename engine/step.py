"""The values of a step: the plan that a scheduler writes, and the result that a runner returns.

All of them are frozen, picklable and free of tensors. `engine.types` explains the vocabulary and
exports these values too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from sampling_params import SamplingParams
from utils.errors import ContractError

# Token id -> log-probability in one place: the token that stands there first, then the most likely
# ones in falling order.
TokenLogprobs = dict[int, float]

# The length limit of a request without one.
NO_LIMIT = 2**31 - 1


class SeedKind(IntEnum):
    """Where a request's seed comes from; noise may differ for equal seeds of two kinds."""

    DERIVED = 0  # from the engine's seed and the order of arrival
    GIVEN = 1  # by the user


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request enters a slot; sent once, so that later steps name the slot alone.

    Attributes:
        token_ids: all tokens known so far: the prompt and, after a preemption, the output so far.
        seed: key of the request's sampling noise, 0 <= seed < 2**63.
        num_output_tokens: how many of the tokens are output.
        withheld_token_ids: tokens that may not be sampled before `sampling.min_tokens`; empty
            without it. The scheduler finds the end of an output, so a runner need not look for it.
        max_total_tokens: most tokens, prompt and output together. The runner keeps no token
            beyond this length, however many positions a plan allows.
        sample: index of this output among those of its prompt.
        seed_kind: where the seed comes from. Noise may depend on `sample` and `seed_kind` too; that
            of the shipped runners does not.
    """

    slot: int
    request_id: int
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    num_output_tokens: int = 0
    withheld_token_ids: tuple[int, ...] = ()
    max_total_tokens: int = NO_LIMIT
    sample: int = 0
    seed_kind: SeedKind = SeedKind.DERIVED


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """`block_ids` become entries `first_index`, `first_index + 1`, ... of a slot's block table.

    `group` is the cache group whose table it is. A runner is not told when a block leaves a window:
    its table keeps the old id, and the block may belong to another request by then. So a runner
    must not read an entry before the kind's `first_read`.
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

    Attributes:
        samples: the next token is sampled: the chunk ends at the last known token, and the length
            limit allows one more. If the limit allows none, the request ends with this chunk.
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

    A decode row starts at the first position that is not computed. The runner sampled the token of
    that position in an earlier step. The row may compute up to `decode_tokens[i]` positions. The
    runner drafts the tokens of the further positions. It keeps (accepts) a position if every
    drafted token up to it equals the token that it would have sampled there.

    The runner neither computes nor writes a position from `max_total_tokens - 1` on: it cuts a row
    there, and the scheduler reserves no block for such positions.

    Attributes:
        step_id: 0, 1, 2, ... in order of planning; from 0 again after an exception, which ends all
            requests and steps.
        block_copies: in any order; no target is a source or another one's target. What a source
            holds was written by earlier steps; later ones may write to it.
        decode_tokens: most positions that each row of `decode` computes, each at least 1; empty
            stands for 1 each.
        poisoned_blocks: for each cache group the blocks to fill with NaN before anything else;
            empty stands for none. Only the KV sanitizer sets it.
        timed: the result has to have `device_seconds`.
    """

    step_id: int
    new_requests: tuple[NewRequest, ...] = ()
    block_updates: tuple[BlockUpdate, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[int, ...] = ()
    block_copies: tuple[BlockCopy, ...] = ()
    decode_tokens: tuple[int, ...] = ()
    poisoned_blocks: tuple[tuple[int, ...], ...] = ()
    timed: bool = False

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
    """What a row has beside its tokens.

    Attributes:
        error: why the request cannot go on. It ends with finish_reason "error" and without the
            row's tokens; the other requests of the step go on.
        values: further results by name, e.g. hidden states or a hash of the logits: one entry for
            each of the row's tokens, one for a last chunk that samples nothing. No option of `LLM`
            asks for values yet; a runner decides which it reports.
    """

    error: Exception | None = None
    values: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced.

    Attributes:
        tokens: for each of the plan's `sampled_slots`, in order, its new tokens: one for a chunk,
            for a decode row one for each position kept. That is at least one, at most the row's
            `decode_tokens`, and never more than the request's length limit allows. A position that
            was computed and not kept is computed again by a later step.
        ended_at: the time, on the runner's clock, from which on the host could read the result. A
            runner that cannot see this moment gives the time at which its wait ended.
        logprobs: as `tokens`, for each token its log-probabilities; empty lists for requests that
            did not ask for any, None if no request did.
        prompt_logprobs: for each of the plan's prefill chunks, those of the prompt's tokens at
            start + 1, start + 2, ..., which the chunk's positions predict; else as `logprobs`.
        device_seconds: how long the device worked on the step, if the plan is `timed`.
        reports: of rows that have one, by the row's index in `StepPlan.row_slots`.
    """

    step_id: int
    tokens: list[list[int]]
    ended_at: float
    logprobs: list[list[TokenLogprobs]] | None = None
    prompt_logprobs: list[list[TokenLogprobs]] | None = None
    device_seconds: float | None = None
    reports: Mapping[int, RowReport] = field(default_factory=dict)

    def check(self, plan: StepPlan) -> None:
        """Refuse a result that would give tokens to the wrong request, or too many or too few.

        Raises:
            ContractError: rows or tokens are missing or too many.
        """
        lengths = list(map(len, self.tokens))
        sampling = [row for row, chunk in enumerate(plan.prefill) if chunk.samples]
        num_rows = len(sampling) + len(plan.decode)
        num_scores = num_rows if self.logprobs is None else len(self.logprobs)
        if self.step_id != plan.step_id or not len(lengths) == num_scores == num_rows:
            raise ContractError(
                f"step {plan.step_id} has {num_rows} rows that sample; its result is of step "
                f"{self.step_id}, with tokens of {len(lengths)} and log-probabilities of "
                f"{num_scores}"
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
