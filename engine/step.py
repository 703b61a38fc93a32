"""Plan and result of a step: frozen, picklable dataclasses without tensors.

`engine.types` explains the terms slot, position, block, cache group, row, draft, length limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from sampling_params import SamplingParams
from utils.errors import ContractError

# Token id -> log-probability at a position: first the position's token, then the likeliest tokens.
TokenLogprobs = dict[int, float]

NO_LIMIT = 2**31 - 1  # `max_total_tokens` of a request that has no length limit


class SeedKind(IntEnum):
    """Where the seed of a request's random numbers comes from. Equal seeds of two kinds differ."""

    DERIVED = 0  # computed from the engine's seed and the request's id
    GIVEN = 1  # set by the user


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that gets a slot. Later plans identify the request by its slot alone."""

    slot: int  # index in the runner's per-request tables
    request_id: int  # unique in the engine
    token_ids: tuple[int, ...]  # the prompt and, after a preemption, the output so far
    sampling: SamplingParams  # sampling parameters of the request
    seed: int  # seed of the random numbers that sampling uses, 0 <= seed < 2**63
    num_output_tokens: int = 0  # how many of `token_ids` are output
    withheld_token_ids: tuple[int, ...] = ()  # ids forbidden in the first `min_tokens` output ids
    max_total_tokens: int = NO_LIMIT  # maximum length of prompt and output together
    sample: int = 0  # index of this output among the outputs of its prompt
    seed_kind: SeedKind = SeedKind.DERIVED  # random numbers depend on `seed`, `sample`, `seed_kind`


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """Write `block_ids` to entries `first_index`, `first_index + 1`, ... of a slot's block table.

    With a sliding window, another request may get a block that no later position of this request
    attends to. The runner's table of this request still lists the block. So when the runner
    computes position p, it must not read the KV of positions before `CacheKind.first_read(p)`.
    """

    slot: int  # slot of the request
    first_index: int  # first entry of the block table to write
    block_ids: tuple[int, ...]  # the new entries
    group: int = 0  # index of the cache group


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy the KV of block `source` to block `target`, in every layer of the cache group."""

    source: int  # block to read
    target: int  # block to write
    group: int = 0  # index of the cache group


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute positions [start, start + num_tokens) of the request in a slot.

    The KV of earlier positions is in the cache. `samples` is True if the chunk ends the prefill and
    the length limit allows a further token. The runner then samples the token after the chunk.
    """

    slot: int  # slot of the request
    start: int  # first position to compute
    num_tokens: int  # number of positions
    samples: bool  # whether a token is sampled after the chunk


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the model, as pure data: updates of the runner's tables, and rows to compute.

    A runner applies `new_requests`, then `block_updates`. It makes `block_copies` before or after
    them. Afterwards it computes the rows: prefill chunks, then a decode row for each `decode` slot.

    A decode row starts at the request's first position whose KV is not computed. An earlier step
    sampled the token at this position. Decode row i has at most `decode_tokens[i]` positions. The
    runner drafts the tokens at all positions of a row but the first. A draft is accepted if all
    drafts before it in the row are accepted and sampling gives a token equal to the draft.
    A decode row ends before position `NewRequest.max_total_tokens - 1`, the position of the last
    token. The KV of the last token is never read, so no block is reserved for the token.
    """

    step_id: int  # 0, 1, 2, ... in order of planning; starts at 0 again with each new scheduler
    new_requests: tuple[NewRequest, ...] = ()  # requests that get a slot
    block_updates: tuple[BlockUpdate, ...] = ()  # new entries of block tables
    prefill: tuple[PrefillChunk, ...] = ()  # the prefill chunks
    decode: tuple[int, ...] = ()  # the slot of each decode row
    # The copies can be made in any order: all targets differ, and no target is a source. Earlier
    # steps wrote the source blocks, and later steps may overwrite the source blocks.
    block_copies: tuple[BlockCopy, ...] = ()
    # How many positions each decode row has at most. If empty, each decode row has one position.
    decode_tokens: tuple[int, ...] = ()
    # Freed blocks of each cache group, to fill with NaN before the step (option `kv_sanitizer`).
    poisoned_blocks: tuple[tuple[int, ...], ...] = ()
    timed: bool = False  # whether the result must contain `device_seconds`

    @property
    def num_prefill_tokens(self) -> int:
        """Number of tokens in all prefill chunks, tokens recomputed after a preemption included."""
        return sum(chunk.num_tokens for chunk in self.prefill)

    @property
    def num_tokens(self) -> int:
        """How many positions the step computes at most in all prefill chunks and decode rows."""
        return self.num_prefill_tokens + sum(self.decode_counts)

    @property
    def decode_counts(self) -> tuple[int, ...]:
        """How many positions each decode row has at most; all 1 if `decode_tokens` is empty."""
        return self.decode_tokens or (1,) * len(self.decode)

    @property
    def row_slots(self) -> list[int]:
        """The slot of each row: first the prefill chunks' slots, then the decode rows' slots."""
        return [chunk.slot for chunk in self.prefill] + list(self.decode)

    @property
    def sampled_slots(self) -> list[int]:
        """The slots that get new tokens, in the order of the lists in `StepResult.tokens`."""
        return [chunk.slot for chunk in self.prefill if chunk.samples] + list(self.decode)

    @property
    def sampled_rows(self) -> list[int]:
        """The index in `row_slots` of each element of `sampled_slots`."""
        chunks = [row for row, chunk in enumerate(self.prefill) if chunk.samples]
        return chunks + list(range(len(self.prefill), len(self.prefill) + len(self.decode)))


@dataclass(frozen=True, slots=True)
class RowReport:
    """What a `StepResult` contains for a row besides new tokens: an error or values."""

    # An error ends the request with finish_reason "error", and the row's tokens are dropped.
    error: Exception | None = None
    # For each new token of the row, a mapping from names to further results of the runner. The last
    # chunk of a prompt may have a mapping although it has no new token.
    values: tuple[Mapping[str, Any], ...] = ()
    # Tensor [n, hidden_size] in host memory, of the row's last n positions (`hidden_states`).
    hidden_states: Any = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced."""

    step_id: int  # that of the plan
    # New tokens: a list for each slot of `sampled_slots`. A prefill chunk's list has one token. The
    # list of a decode row has a token for each accepted position, but none beyond the length limit.
    tokens: list[list[int]]
    ended_at: float  # time on the runner's clock when the host saw that the step had ended
    # For each list in `tokens`, the log-probabilities of its tokens; an empty list if the request
    # did not ask for them. `logprobs` is None if no request of the step asked for them.
    logprobs: list[list[TokenLogprobs]] | None = None
    # For each prefill chunk, log-probabilities of the prompt tokens at positions start + 1 to
    # start + num_tokens, except before `prompt_logprobs_start`; empty if not requested.
    # `prompt_logprobs` is None if no request wants any.
    prompt_logprobs: list[list[TokenLogprobs]] | None = None
    device_seconds: float | None = None  # seconds of device work; None unless `StepPlan.timed`
    # Index of a row in `StepPlan.row_slots` -> error or values of the row, if the row has any.
    reports: Mapping[int, RowReport] = field(default_factory=dict)

    def check(self, plan: StepPlan) -> None:
        """Raise a ContractError if the step id or the length of a list does not fit the plan."""
        lengths = list(map(len, self.tokens))
        rows = plan.sampled_rows
        num_rows = len(rows)
        num_scores = num_rows if self.logprobs is None else len(self.logprobs)
        num_chunks = len(plan.prefill if self.prompt_logprobs is None else self.prompt_logprobs)
        found = self.step_id, len(lengths), num_scores, num_chunks
        expected = plan.step_id, num_rows, num_rows, len(plan.prefill)
        if found != expected:
            names = "step, rows with tokens, rows with log-probabilities, chunks"
            raise ContractError(f"a result has {found} instead of {expected} ({names})")
        # Fast path: in most steps each row has one token and no log-probabilities, error or values.
        plain = self.logprobs is None and not self.reports and not plan.decode_tokens
        if plain and lengths.count(1) == num_rows:
            return
        counts = [*([1] * (num_rows - len(plan.decode))), *plan.decode_counts]
        scores = self.logprobs or [[]] * num_rows
        for row, count, length, scored in zip(rows, counts, lengths, scores, strict=True):
            report = self.reports.get(row, RowReport())
            others = {len(scored), len(report.values)} - {0, length}
            if report.error is None and (others or not 1 <= length <= count):
                raise ContractError(
                    f"step {plan.step_id}, row {row}: {length} tokens of {count} positions at "
                    f"most, {len(scored)} log-probabilities and {len(report.values)} values"
                )
