"""The contracts of the engine: scheduler, block manager, model runner and their values.

A *slot* is the row of a running request in the runner's per-request tables. A *position* is a
token's index in its request (prompt first). A *block* is `block_size` consecutive positions of KV
cache; a request's *block table* lists its blocks. Layers that keep the same positions for the same
time are a *cache group* and share block tables; the group's *kind* says which positions it keeps.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

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

if TYPE_CHECKING:
    from engine.requests import Sequence

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

# In a block manager's table: the block was given back, as its positions have left the window.
# Plans never contain it.
NO_BLOCK = -1


@dataclass(frozen=True, slots=True)
class CacheKind(ABC):
    """Which positions a cache group keeps."""

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
    """Keeps the last `window` positions, the newest committed one included."""

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ContractError(f"a window of {self.window} positions")

    def first_read(self, position: int) -> int:
        return max(0, position - self.window + 1)


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """Shape of one cache group: K and V of `num_layers` layers in `num_blocks` blocks."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int
    dtype_bytes: int  # of an element
    kind: CacheKind = field(default_factory=FullPages)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of K and V that one block takes over all layers of the group."""
        per_position = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes
        return self.block_size * per_position


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a prefix cache since its engine started (or started again after an error)."""

    queried_tokens: int = 0  # of requests when they were admitted, again after a preemption
    hit_tokens: int = 0  # those of them that were in the cache
    evicted_blocks: int = 0  # cached blocks given up for their space
    cached_blocks: int = 0  # now


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals since the engine started; each output of a prompt counts as a request."""

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
        """Wait for the step; a StepError if it failed, a WorkerDiedError if a rank has died."""

    def done(self) -> bool:
        """Whether `result` would return at once; runners that cannot tell may say yes."""
        return True


class BlockManager(ABC):
    """Owns the KV blocks of a cache group, and the block table of each running request.

    The constructor takes the `Config` and the group's `KVGeometry`; `memory.cache_groups` makes
    one manager of several groups' managers. A request's life is `begin`, any number of `grow` and
    `commit`, then `release`. All calls are made between steps, from one thread.
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
        """Blocks that `grow` could hand out in the scarcest group, cached ones included."""

    @abstractmethod
    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        """Start a block table and return how many leading tokens are in the cache already.

        Fewer than `len(token_ids)`, as sampling needs the logits of one that is computed; 0 without
        prefix caching. The table has their blocks. If they end inside a block, that one is a free
        block taken for the request alone, and `take_copies` says what has to be copied to it. Only
        requests with the same `cache_salt` share blocks. Until `release` the caller only appends
        to `token_ids`; the manager may go on reading it.
        """

    @abstractmethod
    def grow(self, request_id: int, num_tokens: int) -> bool:
        """Extend every group's table to `num_tokens` tokens; False, unchanged, if out of blocks."""

    @abstractmethod
    def table(self, request_id: int) -> list[int]:
        """The block table, `NO_BLOCK` for blocks given back; the caller must not change it."""

    @abstractmethod
    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """The KV of the first `num_computed` of `token_ids` is known to be written.

        Full blocks of them may be shared from now on, and blocks that no later position reads given
        back. Steps in flight compute only positions from `num_computed` on. Called at least
        whenever a block has become full, and never with drafted positions that were not kept.
        """

    @abstractmethod
    def release(self, request_id: int) -> None:
        """Drop the request's references. The caller knows that no step in flight uses them."""

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """What the next plan has to copy for requests begun since the last call and not released.

        The sources are kept from being handed out until this call.
        """
        return ()

    def pending(self, token_ids: list[int], cache_salt: str = "") -> PendingPrefix | None:
        """A longer prefix than `begin` would find now, if a request that has begun computes it.

        The prefix does not come if that request is released before it has committed so many tokens.
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

    The constructor takes the `Config`, the `BlockManager` and the runner's `Clock`. No decision and
    no time of a request may read another clock: a runner without a device keeps virtual time.

    Between `schedule` and `commit` of a plan its requests are *in flight*: they may be planned
    again, but neither preempted nor released. Plans are committed in the order of planning.
    After an exception the engine makes a new scheduler and block manager; step ids start at 0.

    A decode row keeps between 1 and `decode_tokens[i]` positions, and only `commit` tells how many.
    So blocks and budget are reserved for the latest start of the request's next row. A request that
    may have reached its length limit is not planned before `commit` tells.

    `commit` appends to a request's `token_ids`, `token_times` (`ended_at` for each token),
    `logprobs`, `prompt_logprobs` and `values`, and sets `finish_reason` and `error`. A reported
    error ends its request with reason "error". The first admission sets `admitted_at` and
    `num_cached`; preemptions are counted in `num_preemptions`.
    `engine.running_batch.RunningBatch` does all of this.
    """

    name: ClassVar[str]
    # The options of `Config` for policies that it uses; the engine refuses others.
    policies: ClassVar[Collection[str]] = ()

    @property
    @abstractmethod
    def has_unfinished(self) -> bool:
        """Whether any request is waiting, running or in flight."""

    @abstractmethod
    def add(self, seq: Sequence) -> None:
        """Queue a request; a RequestTooLongError if it could never run."""

    @abstractmethod
    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be planned before something is committed.

        None with nothing in flight while requests are unfinished is a StepError of the engine.
        """

    @abstractmethod
    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Take in the oldest plan's result; returns the requests that finished with it.

        Tokens behind a stop token or the length limit are dropped with all that belongs to them,
        and so are the rows of requests that have ended.
        """

    @abstractmethod
    def abort(self, request_id: int) -> Sequence | None:
        """End a request with finish_reason "abort"; None if it is unknown or has finished."""


class ModelRunner(ABC):
    """Executes plans. Owns the model, the KV tensors, the device and the clock.

    The constructor takes the `Config` and the `Checkpoint`. `execute` after `close` is an
    EngineClosedError. `ended_at` never falls from one step's result to the next. A runner that
    overrides `now` also overrides `wait_until`.
    """

    name: ClassVar[str]
    # Whether decode rows may compute several positions. Otherwise a row keeps one of those that the
    # plan allows, and the engine refuses `num_speculative_tokens`.
    drafts: ClassVar[bool] = False
    # False for a runner that computes nothing: "auto" and None are then the same on every machine.
    has_device: ClassVar[bool] = True

    @property
    @abstractmethod
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        """The KV cache that plans may use, by cache group; all have the same block size."""

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepHandle:
        """Start a step and return at once. Steps take effect in the order of these calls."""

    # Seconds since a fixed moment: the engine's only clock. A part of the runner may hold the
    # default, which is no bound method: that would keep the runner's memory alive.
    now: Clock = staticmethod(time.perf_counter)

    def wait_until(self, moment: float) -> None:
        """Return when `now` is `moment` or later: sleep, or move virtual time there."""
        while (left := moment - self.now()) > 0:
            time.sleep(left)

    @abstractmethod
    def close(self) -> None:
        """Wait for what is in flight and give all memory back; may be called twice."""
