"""The contracts of the engine: scheduler, block manager, model runner and their values.

A scheduler writes a `StepPlan`, a runner executes it behind a `StepHandle`, and a commit turns
the `StepResult` back into request state. Nothing here needs a device or a model, so a scheduler
or a block manager can be written and tested against this file and `engine.step` alone.

Vocabulary: a *slot* is the row of a request in the runner's per-request tables, held while the
request runs. A *position* is a token's index in its request (prompt first). A *block* is
`block_size` consecutive positions of KV cache; a request's *block table* lists its blocks.
Layers that keep the same positions for the same time are a *cache group* and share block tables;
a group's *kind* says which positions it keeps. Most models have one group of full pages.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import ClassVar

from engine.sequence import Sequence
from engine.step import (
    NO_LIMIT,
    BlockCopy,
    BlockUpdate,
    NewRequest,
    PrefillChunk,
    RowReport,
    SeedKind,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from utils.errors import ContractError

# fmt: off
__all__ = [
    "NO_BLOCK", "NO_LIMIT", "BlockCopy", "BlockManager", "BlockUpdate", "CacheKind", "CacheStats",
    "Clock", "EngineStats", "FullPages", "KVGeometry", "ModelRunner", "NewRequest", "PendingPrefix",
    "PrefillChunk", "RowReport", "Scheduler", "SeedKind", "StepHandle", "StepPlan", "StepResult",
    "TokenLogprobs", "WindowPages",
]
# fmt: on

# Seconds since a fixed moment, as `ModelRunner.now` tells them.
Clock = Callable[[], float]

# In a block manager's table: the block of this entry was given back, because its positions have
# left the window. Plans never contain it.
NO_BLOCK = -1


@dataclass(frozen=True, slots=True)
class CacheKind(ABC):
    """Which positions a cache group keeps, and what a block of them takes."""

    def bytes_per_block(self, geometry: KVGeometry) -> int:
        """Bytes that one block takes over all layers of the group: K and V of its positions."""
        g = geometry
        return g.num_layers * g.block_size * 2 * g.num_kv_heads * g.head_dim * g.dtype_bytes

    @abstractmethod
    def first_read(self, position: int) -> int:
        """The earliest position that computing `position` reads; it never falls with `position`."""


@dataclass(frozen=True, slots=True)
class FullPages(CacheKind):
    """Keeps every position as long as its request runs."""

    def first_read(self, position: int) -> int:
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

    `dtype_bytes` are bytes per element; `kind` says which positions the group keeps.
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
class CacheStats:
    """Counters of a prefix cache since its engine started (or started again after an error)."""

    queried_tokens: int = 0  # of requests when they were admitted, again after a preemption
    hit_tokens: int = 0  # those of them that were in the cache
    evicted_blocks: int = 0  # cached blocks given up for their space
    cached_blocks: int = 0  # now


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals of an engine since it started, those of the cache perhaps since a failed step.

    Outputs of one prompt count as requests of their own.
    """

    steps: int  # that were committed
    finished_requests: int  # that have ended, however they did
    unfinished_requests: int  # that wait or run now
    prompt_tokens: int  # of finished requests, like the next two
    output_tokens: int
    preemptions: int
    num_blocks: int  # of the KV cache
    num_free_blocks: int  # of the KV cache, now
    cache: CacheStats


@dataclass(frozen=True, slots=True)
class PendingPrefix:
    """`num_tokens` leading tokens, in the cache once request `request_id` has committed as many."""

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
    group's `KVGeometry`. `memory.cache_groups` makes one manager of those of several groups.

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

        None if no request that has begun is computing it. The prefix comes when that request has
        committed so many tokens, and does not come if the request is released before.
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
    `num_preemptions`. A reported error ends its request with reason "error".
    `engine.running_batch.RunningBatch` does all of this.

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
