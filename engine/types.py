"""The contracts of the engine and the values that pass between its parts.

A scheduler writes a `StepPlan`, a runner executes it behind a `StepHandle`, and a commit turns
the `StepResult` back into request state. Nothing here needs a device or a model, so a scheduler
or a block manager can be written and tested against this file alone.

Vocabulary: a *slot* is the row of a request in the runner's per-request tables, held while the
request runs. A *position* is a token's index in its request (prompt first). A *block* is
`block_size` consecutive positions of KV cache; a request's *block table* lists its blocks.
Layers that keep the same positions for the same time are a *cache group* and share block tables;
a group's *kind* says which positions it keeps. Most models have one group of full pages.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

from sampling_params import SamplingParams
from utils.errors import ContractError

if TYPE_CHECKING:
    from engine.sequence import Sequence


# Token id -> log-probability in one place: the token that stands there first, then the most likely
# ones in falling order.
TokenLogprobs = dict[int, float]

# Seconds since a fixed moment, as `ModelRunner.now` tells them.
Clock = Callable[[], float]

# In a block manager's table: the block of this entry was given back, because its positions have
# left the window. Plans never contain it.
NO_BLOCK = -1

# The length limit of a request without one.
NO_LIMIT = 2**31 - 1


class SeedKind(IntEnum):
    """Where a request's seed comes from; noise may differ for equal seeds of two kinds."""

    DERIVED = 0  # from the engine's seed and the order of arrival
    GIVEN = 1  # by the user


@dataclass(frozen=True, slots=True)
class CacheKind(ABC):
    """Which positions a cache group keeps, and what a block of them takes."""

    def bytes_per_block(self, geometry: KVGeometry) -> int:
        """Bytes that one block takes over all layers of the group: K and V of its positions."""
        g = geometry
        return g.num_layers * g.block_size * 2 * g.num_kv_heads * g.head_dim * g.dtype_bytes

    @abstractmethod
    def first_read(self, position: int) -> int:
        """The earliest position that computing `position` reads.

        A later position never has a smaller result.
        """


@dataclass(frozen=True, slots=True)
class FullPages(CacheKind):
    """Keeps every position as long as its request runs."""

    def first_read(self, position: int) -> int:
        del position
        return 0


@dataclass(frozen=True, slots=True)
class WindowPages(CacheKind):
    """Keeps the last `window` positions, the newest one included.

    A block is given back when the next committed row can read none of its positions. The window
    moves with committed positions, never with drafted ones.

    Raises:
        ContractError: the window has no position.
    """

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ContractError(f"a window of {self.window} positions")

    def first_read(self, position: int) -> int:
        return max(0, position - self.window + 1)


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """Shape of one cache group: K and V of `num_layers` layers in `num_blocks` blocks.

    Attributes:
        dtype_bytes: bytes per element.
        kind: which positions the group keeps.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int
    dtype_bytes: int
    kind: CacheKind = field(default_factory=FullPages)

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes over all layers of the group."""
        return self.kind.bytes_per_block(self)


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request enters a slot; sent once, so that later steps name the slot alone.

    Attributes:
        token_ids: all tokens known so far: the prompt and, after a preemption, the output so far.
        seed: key of the request's sampling noise, 0 <= seed < 2**63.
        num_output_tokens: how many of the tokens are output.
        stop_token_ids: tokens that may not be sampled before `sampling.min_tokens`; empty without
            it. A runner need not look for the end of an output: the scheduler drops what follows.
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
    stop_token_ids: tuple[int, ...] = ()
    max_total_tokens: int = NO_LIMIT
    sample: int = 0
    seed_kind: SeedKind = SeedKind.DERIVED


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """`block_ids` become entries `first_index`, `first_index + 1`, ... of a slot's block table.

    A runner is not told when a block leaves a window. Its table keeps the old id, which may belong
    to another request by then. So no entry may be read that lies before the kind's `first_read`.

    Attributes:
        group: the cache group whose table it is.
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

    The scheduler reserves blocks for these positions from the latest possible start, but for none
    at `max_total_tokens - 1` or later. The runner cuts a row there: it neither computes nor writes
    a position from `max_total_tokens - 1` on. The next step may be planned before the number kept
    is known; its row then starts where this one left off.

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
        """Most positions that each decode row computes, written out."""
        return self.decode_tokens or (1,) * len(self.decode)

    @property
    def rows(self) -> list[int]:
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
            for a decode row as many as positions were kept. That is at least one, at most the
            row's `decode_tokens`, and never more than the request's length limit allows. A
            position that was computed and not kept is computed again by a later step.
        ended_at: the time, on the runner's clock, from which on the host could read the result. A
            runner that cannot see this moment gives the time at which its wait ended.
        logprobs: as `tokens`, for each token its log-probabilities; empty lists for requests that
            did not ask for any, None if no request did.
        prompt_logprobs: for each of the plan's prefill chunks, those of the prompt's tokens at
            start + 1, start + 2, ..., which the chunk's positions predict; else as `logprobs`.
        device_seconds: how long the device worked on the step, if the plan is `timed`.
        reports: of rows that have one, by the row's index in `StepPlan.rows`.
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
        rows = [*sampling, *range(len(plan.prefill), len(plan.rows))]
        counts = [*([1] * len(sampling)), *plan.decode_counts]
        scores = self.logprobs or [[]] * num_rows
        for row, count, length, scored in zip(rows, counts, lengths, scores, strict=True):
            report = self.reports.get(row, RowReport())
            if report.error is not None:
                continue
            others = {len(scored), len(report.values)}
            if not 1 <= length <= count or not others <= {0, length}:
                raise ContractError(
                    f"step {plan.step_id}, row {row}: {length} tokens of {count} positions at "
                    f"most, {len(scored)} log-probabilities and {len(report.values)} values"
                )


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a prefix cache since its engine started (or started again after an error).

    Attributes:
        queried_tokens: tokens of requests when they were admitted, again after a preemption.
        hit_tokens: those of them that were in the cache.
        evicted_blocks: cached blocks given up for their space.
        cached_blocks: blocks that are cached now.
    """

    queried_tokens: int = 0
    hit_tokens: int = 0
    evicted_blocks: int = 0
    cached_blocks: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals of an engine since it started, those of the cache perhaps since a failed step.

    Attributes:
        steps: that were committed.
        finished_requests: that have ended, however they did; outputs of one prompt count apart.
        unfinished_requests: that wait or run now.
        prompt_tokens, output_tokens, preemptions: of those that have ended.
        num_blocks, num_free_blocks: of the KV cache now.
        cache: the prefix cache.
    """

    steps: int
    finished_requests: int
    unfinished_requests: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    num_blocks: int
    num_free_blocks: int
    cache: CacheStats


@dataclass(frozen=True, slots=True)
class PendingPrefix:
    """Leading tokens that a running request is about to compute.

    Attributes:
        request_id: that request.
        num_tokens: leading tokens that will be in the cache when it has committed as many.
    """

    request_id: int
    num_tokens: int


class StepHandle(ABC):
    """A step under way."""

    @abstractmethod
    def result(self) -> StepResult:
        """Wait for the step and return its tokens.

        Raises:
            StepError: the step failed.
            WorkerDiedError: a process that took part in it has ended.
        """

    def done(self) -> bool:
        """Whether `result` would return at once; runners that cannot tell may say yes."""
        return True


class BlockManager(ABC):
    """Owns the KV blocks: which are free, and the block table of each running request.

    A manager has the blocks of one cache group; its constructor takes the `Config` and the
    group's `KVGeometry`. `memory.grouped_blocks` makes one manager of those of several groups.

    Requests are known by their `request_id`. A request's life is `begin`, any number of `grow`
    and `commit`, then `release`. All calls are made between steps, from one thread.
    """

    name: ClassVar[str]
    caches_prefixes: ClassVar[bool] = False

    @property
    def groups(self) -> tuple[BlockManager, ...]:
        """The manager of each cache group; itself for one group."""
        return (self,)

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks in all; of several groups those of the smallest."""

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks that `grow` could hand out now, reusable cached ones included.

        Of several groups, those of the scarcest.
        """

    @abstractmethod
    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        """Start a block table and return how many leading tokens are in the cache already.

        The returned number is below `len(token_ids)`: at least one token is always computed, to
        have logits to sample from. 0 without prefix caching. The table has the blocks of these
        tokens. If they end inside a block, that one is a free block taken for the request alone,
        and `take_copies` says what has to be copied to it. Only requests with the same
        `cache_salt` share blocks. Until `release` the caller only appends to `token_ids`; the
        manager may go on reading it.
        """

    @abstractmethod
    def grow(self, request_id: int, num_tokens: int) -> bool:
        """Extend the table to hold `num_tokens` tokens; False, and no change, if out of blocks.

        With several groups all of them are extended, or none.
        """

    @abstractmethod
    def table(self, request_id: int) -> list[int]:
        """The block table; the caller must not change it.

        `NO_BLOCK` stands where a block left the window and was given back.
        """

    @abstractmethod
    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """The KV of the first `num_computed` of `token_ids` is known to be written.

        From here on full blocks of them may be shared with other requests, and blocks that no
        later position reads may be given back. Steps in flight compute only positions from
        `num_computed` on. Called at least whenever a block has become full. Positions that were
        drafted and not kept are never among them.
        """

    @abstractmethod
    def release(self, request_id: int) -> None:
        """Drop the request's references. The caller knows that no step in flight uses them."""

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """What has to be copied for the requests that have begun since the last call.

        The caller puts them into the plan that it makes now. Up to here the sources are kept
        from being handed out; nothing is copied for requests that were released before.
        """
        return ()

    def pending(self, token_ids: list[int], cache_salt: str = "") -> PendingPrefix | None:
        """A longer cached prefix than `begin` would find now, if it is about to come.

        None if no request that has begun is computing it. It comes when that request has
        committed so many tokens, and does not if it is released before.
        """
        return None

    def reset_prefix_cache(self) -> None:  # noqa: B027  (nothing to forget without caching)
        """Forget what is cached; what running requests compute is not cached either."""

    @property
    def stats(self) -> CacheStats:
        """Counters of the prefix cache; zeros without one."""
        return CacheStats()


class Scheduler(ABC):
    """Decides what each step computes. Pure CPU work; never touches a device.

    Its constructor takes the `Config`, the `BlockManager` and the runner's `Clock`. No decision
    and no time of a request may read another clock: a runner without a device keeps virtual time.

    Between `schedule` and `commit` of a plan its requests are *in flight*: they may be planned
    again, but neither preempted nor released. Plans are committed in the order of planning.
    After an exception the engine makes a new scheduler and a new block manager, and step ids start
    at 0.

    A decode row in flight keeps between 1 and `decode_tokens[i]` positions, and only `commit`
    tells how many. So the start of the request's next row is known as a range: blocks and budget
    are reserved for the latest one, and what is committed rises by the number kept. A request is
    not planned while it may have reached its length limit, and goes on if it has not.

    `commit` appends to the request's `token_ids`, `token_times` (`ended_at` for each token),
    `logprobs`, `prompt_logprobs` and `values`, and sets `finish_reason` and `error`. At admission
    the scheduler sets `admitted_at`, by the clock, and `num_cached`, once; it counts
    `num_preemptions`. A reported error ends its request with reason "error". `engine.ledger.Ledger`
    does all of this.

    Attributes:
        policies: the options of `Config` for policies that it uses; the engine refuses others.
    """

    name: ClassVar[str]
    policies: ClassVar[Collection[str]] = ()

    @property
    @abstractmethod
    def has_unfinished(self) -> bool:
        """Whether any request is waiting, running or in flight."""

    @abstractmethod
    def add(self, seq: Sequence) -> None:
        """Queue a request.

        Raises:
            RequestTooLongError: it could never run, however long it waited.
        """

    @abstractmethod
    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be planned before something is committed.

        None with nothing in flight while requests are unfinished is a StepError of the engine.
        """

    @abstractmethod
    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Take in the oldest plan's result; returns the requests that finished with it.

        Tokens behind a stop token or the length limit are dropped, and all that belongs to them:
        log-probabilities, times, values.
        """

    @abstractmethod
    def abort(self, request_id: int) -> Sequence | None:
        """End a request with finish_reason "abort"; None if it is unknown or has finished.

        What is in flight for it is discarded when committed.
        """


class ModelRunner(ABC):
    """Executes plans. Owns the model, the KV tensors, the device and the clock.

    Its constructor takes the `Config` and the `Checkpoint`. `execute` after `close` is an
    EngineClosedError. A runner that does not draft keeps one position of a decode row, however many
    the plan allows. Results never have an earlier `ended_at` than those of earlier steps. A runner
    that overrides `now` also overrides `wait_until`.

    Attributes:
        drafts: whether decode rows may compute several positions; the engine refuses
            `num_speculative_tokens` otherwise.
        has_device: False for a runner that computes nothing. What "auto" and None stand for does
            then not depend on the machine, so that neither does a run.
    """

    name: ClassVar[str]
    drafts: ClassVar[bool] = False
    has_device: ClassVar[bool] = True

    @property
    @abstractmethod
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        """The KV cache that plans may use, by cache group; all have the same block size."""

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepHandle:
        """Start a step and return at once. Steps take effect in the order of these calls."""

    @staticmethod
    def host_clock() -> float:
        """The default of `now`.

        A part of a runner is given this function instead of `runner.now`: a bound method would keep
        the runner and its memory alive.
        """
        return time.perf_counter()

    def now(self) -> float:
        """Seconds since a fixed moment: the engine's only clock."""
        return self.host_clock()

    def wait_until(self, moment: float) -> None:
        """Return when `now` is `moment` or later: sleep, or move virtual time there."""
        while (left := moment - self.now()) > 0:
            time.sleep(left)

    @abstractmethod
    def close(self) -> None:
        """Wait for what is in flight and give all memory back; may be called twice."""
