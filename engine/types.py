"""Interfaces of scheduler, block manager and model runner, and the values that they exchange.

A *slot* is the index of a running request in the runner's per-request tables. A *position* is the
index of a token in its request; the prompt comes first. A *block* is KV cache for `block_size`
consecutive positions. A request's *block table* lists the request's blocks. A *cache group* is a
set of layers that keep the KV of the same positions. Each request has one block table for each
cache group. The *kind* of a cache group tells which positions the group keeps. A *row* of a step
is the work for one request in this step. A step is *in flight* from `schedule` until `commit`.
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

# Type of `ModelRunner.now`, which returns the seconds since a fixed moment.
Clock = Callable[[], float]

# Table entry of a block that was freed because the sliding window had passed it. Not in plans.
NO_BLOCK = -1


@dataclass(frozen=True, slots=True)
class CacheKind(ABC):
    """Tells which positions a cache group keeps."""

    @abstractmethod
    def first_read(self, position: int) -> int:
        """The earliest position that `position` attends to; never falls as `position` rises."""


@dataclass(frozen=True, slots=True)
class FullPages(CacheKind):
    """Full attention: the group keeps all positions of a request as long as the request runs."""

    def first_read(self, position: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class WindowPages(CacheKind):
    """Sliding window: a position attends to the last `window` positions, itself included."""

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
    num_kv_heads: int  # KV heads of one rank
    head_dim: int
    block_size: int
    num_blocks: int
    dtype_bytes: int  # bytes of one element
    kind: CacheKind = field(default_factory=FullPages)

    @property
    def bytes_per_block(self) -> int:
        """Bytes that K and V of one block take, over all layers of the group."""
        per_position = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes
        return self.block_size * per_position


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a prefix cache. The counters start at 0 again when an error resets the engine."""

    queried_tokens: int = 0  # tokens looked up at admissions; each readmission counts again
    hit_tokens: int = 0  # how many of `queried_tokens` were found in the cache
    evicted_blocks: int = 0  # cached blocks that were evicted to make room
    cached_blocks: int = 0  # blocks that are in the cache now


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals since the engine started. A prompt with `n` outputs counts as `n` requests."""

    steps: int  # committed steps
    finished_requests: int  # requests that have ended for any reason, aborted ones included
    unfinished_requests: int  # requests that wait or run now
    prompt_tokens: int  # prompt tokens of all `finished_requests`
    output_tokens: int  # output tokens of all `finished_requests`
    preemptions: int  # preemptions of all `finished_requests`
    num_blocks: int  # blocks of the KV cache
    num_free_blocks: int  # blocks that can be handed out now, cached ones included
    cache: CacheStats


@dataclass(frozen=True, slots=True)
class PendingPrefix:
    """A prefix that will be cached when request `request_id` has committed `num_tokens` tokens."""

    request_id: int
    num_tokens: int


class StepHandle(ABC):
    """A step that a runner has started."""

    @abstractmethod
    def result(self) -> StepResult:
        """Wait for the result. StepError: the step failed. WorkerDiedError: a rank has died."""

    def done(self) -> bool:
        """Whether `result` would return without waiting. A runner that cannot tell returns True."""
        return True


class BlockManager(ABC):
    """Owns the KV blocks of a cache group, and the block table of each running request.

    The constructor takes the `Config` and the group's `KVGeometry`. If there are several groups,
    `memory.cache_groups` wraps their managers in one manager. The calls for a request are `begin`,
    any number of `grow` and `commit`, then `release`. Calls never run concurrently.
    """

    name: ClassVar[str]
    caches_prefixes: ClassVar[bool] = False

    @property
    def groups(self) -> tuple[BlockManager, ...]:
        """The manager of each cache group; `(self,)` if there is one group."""
        return (self,)

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Total number of blocks, in the cache group that has the fewest."""

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Number of free or evictable blocks, in the cache group that has the fewest of them."""

    @abstractmethod
    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        """Start a request's block table, and return how many leading tokens are cached already.

        The last token never counts as cached, because sampling needs the token's logits. Without
        prefix caching the result is 0. The table gets the blocks of the cached tokens. If the
        cached tokens end inside a block, the table ends with a new block for this request alone.
        `take_copies` then returns the copy that fills the new block. Only requests with equal
        `cache_salt` share blocks. Until `release` the caller may only append to `token_ids`, and
        after the last `commit` also drop tokens at the end of the output (after a stop string).
        """

    @abstractmethod
    def grow(self, request_id: int, num_tokens: int) -> bool:
        """Extend the table to `num_tokens` tokens. False (nothing changes) if blocks run out."""

    @abstractmethod
    def table(self, request_id: int) -> list[int]:
        """The request's block table; freed blocks are `NO_BLOCK`. Callers must not change it."""

    @abstractmethod
    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """Record that the KV of the first `num_computed` tokens of `token_ids` has been written.

        The manager may now share full blocks of these tokens, and free blocks that no later
        position reads. Steps in flight write only positions from `num_computed` on. The caller
        commits whenever a block has become full. Rejected draft tokens never count as computed.
        """

    @abstractmethod
    def release(self, request_id: int) -> None:
        """Release the request's blocks. The caller ensures that no step in flight uses them."""

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """Return the copies for the next plan: those that `begin` has needed since the last call.

        Copies for released requests are left out. Blocks to copy are not evicted before this call.
        """
        return ()

    def pending(self, token_ids: list[int], cache_salt: str = "") -> PendingPrefix | None:
        """A prefix of `token_ids` that a running request will add to the cache; None without one.

        If the running request is released before it commits the prefix, the prefix is not cached.
        """
        return None

    def reset_prefix_cache(self) -> None:  # noqa: B027  (nothing to forget without caching)
        """Forget all cached blocks. Requests that run now add no blocks to the cache any more."""

    @property
    def stats(self) -> CacheStats:
        """Counters of the prefix cache; all 0 if the manager does not cache prefixes."""
        return CacheStats()


class Scheduler(ABC):
    """Decides what each step computes. Does only CPU work and never touches a device.

    The constructor takes the `Config`, the `BlockManager` and the runner's `Clock`. A scheduler
    must not read any other clock, because a runner without a device keeps virtual time.

    A request in flight may be planned again, but not preempted, and keeps its blocks. Plans are
    committed in the order of planning. After an exception the engine makes a new scheduler and
    block manager, and step ids restart at 0.

    The runner accepts at least one position of each decode row. Only `commit` tells the scheduler
    how many positions were accepted. Until then blocks are reserved as if all were accepted. If
    the steps in flight may bring a request to its length limit, the request is not planned again
    until `commit` shows that the request continues.

    `commit` appends to a request's `token_ids`, `logprobs`, `prompt_logprobs`, `values` and
    `token_times` (the step's `ended_at`, once for each token), and sets `finish_reason` and
    `error`. If a row reports an error, its request ends with finish_reason "error". A request whose
    length limit is its prompt's length gets no token: its last chunk has `samples=False`, and the
    commit of this chunk ends the request with "length". The first
    admission sets `admitted_at` and `num_cached`. Each preemption adds 1 to `num_preemptions`. The
    class `engine.running_batch.RunningBatch` does this bookkeeping.
    """

    name: ClassVar[str]
    # The policy options that the scheduler uses. Setting any other one raises a ConfigError.
    policies: ClassVar[Collection[str]] = ()

    @property
    @abstractmethod
    def has_unfinished(self) -> bool:
        """Whether any request is waiting, running or in flight."""

    @abstractmethod
    def add(self, seq: Sequence) -> None:
        """Queue a request. Raises RequestTooLongError if the whole cache is too small for it."""

    @abstractmethod
    def schedule(self) -> StepPlan | None:
        """Plan the next step. Returns None if nothing can be planned now.

        The engine raises a StepError on None if requests are unfinished and no step is in flight.
        """

    @abstractmethod
    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Apply the result of the oldest plan in flight. Returns the requests that it ends.

        Tokens after a stop token or beyond the length limit are dropped, with their times,
        log-probabilities and values. Rows of requests that ended earlier are dropped too.
        """

    @abstractmethod
    def abort(self, request_id: int) -> Sequence | None:
        """End a request with finish_reason "abort". Returns it; None if it is unknown or ended."""


class ModelRunner(ABC):
    """Executes plans. Owns the model, the KV tensors, the device and the clock.

    The constructor takes the `Config` and the `Checkpoint`. After `close`, `execute` raises an
    EngineClosedError. `StepResult.ended_at` never falls from one step to the next. A runner
    that overrides `now` also overrides `wait_until`.
    """

    name: ClassVar[str]
    # Whether the runner drafts tokens for speculative decoding. If False, every decode row computes
    # one position, and the engine refuses the option `num_speculative_tokens`.
    drafts: ClassVar[bool] = False
    # False for a runner that uses no device. For such a runner, options that depend on the machine
    # get the values of a machine without a GPU, so that runs are equal on all machines.
    has_device: ClassVar[bool] = True

    @property
    @abstractmethod
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        """Shape of each cache group's KV cache. All groups have the same block size."""

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepHandle:
        """Start a step, if possible without waiting for its end. Steps run in call order."""

    # The engine's only clock: seconds since a fixed moment. The default is a plain function. If it
    # were a bound method, a scheduler that stores `now` would keep the runner's memory alive.
    now: Clock = staticmethod(time.perf_counter)

    def wait_until(self, moment: float) -> None:
        """Return when `now()` has reached `moment`: sleep, or advance a virtual clock."""
        while (left := moment - self.now()) > 0:
            time.sleep(left)

    @abstractmethod
    def close(self) -> None:
        """Wait for the steps in flight and free all memory. A second call does nothing."""
