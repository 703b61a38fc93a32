"""Interfaces of scheduler, block manager and model runner, and the values that they exchange.

A *slot* is the index of a running request in the runner's per-request tables. A *position* is the
index of a token in the prompt and output of its request. A *block* is KV cache for `block_size`
consecutive positions. A *cache group* is a set of layers that keep the KV of the same positions,
e.g. all layers with one window size. The group's *kind* tells which positions the group keeps. A
request's *block table* lists the request's blocks in one cache group. *Admission* gives a request a
slot and blocks, and *preemption* takes them away until the next admission. A *row* of a step is the
work for one request in this step. A step is *in flight* from `schedule`, which plans the step, to
`commit`, which applies the step's result. After `commit` the positions of the step's rows, except
rejected drafts, are *committed*. *Drafts* are tokens that speculative decoding proposes. A
request's *length limit* is the maximum number of its prompt and output tokens.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from engine.cache_kinds import NO_BLOCK, CacheKind, FullPages, WindowPages
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

Clock = Callable[[], float]  # type of `ModelRunner.now`: returns the seconds since a fixed moment


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """Shape of the KV cache that each rank holds for one cache group."""

    num_layers: int  # number of layers in the cache group
    num_kv_heads: int  # number of KV heads on one rank
    head_dim: int  # elements of a KV head
    block_size: int  # positions per block
    num_blocks: int  # blocks of the cache group
    dtype_bytes: int  # bytes of one element
    kind: CacheKind = field(default_factory=FullPages)  # which positions it keeps

    @property
    def bytes_per_block(self) -> int:
        """Bytes of K and V of one block, in all layers of the cache group."""
        per_position = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes
        return self.block_size * per_position


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a prefix cache. The counters start at 0 again when an error resets the engine."""

    queried_tokens: int = 0  # tokens looked up in the cache at admissions, also at readmissions
    hit_tokens: int = 0  # how many of the `queried_tokens` tokens were found in the cache
    evicted_blocks: int = 0  # cached blocks that were evicted because a request needed a block
    cached_blocks: int = 0  # blocks that are in the cache now


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of steps, requests, tokens, blocks. A prompt's `n` outputs count as `n` requests."""

    steps: int  # steps that were committed since the engine started
    finished_requests: int  # requests that have ended for any reason, aborted ones included
    unfinished_requests: int  # requests that wait or run now
    prompt_tokens: int  # prompt tokens of all finished requests together
    output_tokens: int  # output tokens of all finished requests together
    preemptions: int  # preemptions of all finished requests together
    num_blocks: int  # all blocks of the KV cache, free or not
    num_free_blocks: int  # blocks that no request uses; some may hold cached prefixes
    cache: CacheStats  # counters of the prefix cache


@dataclass(frozen=True, slots=True)
class PendingPrefix:
    """A prefix that a running request is computing now and will add to the prefix cache."""

    request_id: int  # the running request that computes the prefix
    num_tokens: int  # length of the prefix


class StepHandle(ABC):
    """The future result of a step that a runner has started."""

    @abstractmethod
    def result(self) -> StepResult:
        """Await the result. Raises StepError if the step failed, WorkerDiedError if a rank died."""

    def done(self) -> bool:
        """Whether the step has ended. Also True if the runner cannot know this without waiting."""
        return True


class BlockManager(ABC):
    """Owns the KV blocks of a cache group, and the block table of each running request.

    The constructor takes the `Config` and the group's `KVGeometry`. `memory.cache_groups` combines
    the managers of several groups into one manager. For each request the scheduler calls `begin`,
    then `grow` and `commit` any number of times, then `release`. Calls never run concurrently.
    """

    name: ClassVar[str]  # the value of the option `block_manager`
    caches_prefixes: ClassVar[bool] = False  # whether requests share cached prefixes

    @property
    def groups(self) -> tuple[BlockManager, ...]:
        """The manager of each cache group. A manager of a single cache group returns `(self,)`."""
        return (self,)

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Number of all blocks. With several cache groups: the minimum over the groups."""

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Number of blocks that no request uses. With several groups: the minimum over them."""

    @abstractmethod
    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        """Create a request's block table. Returns how many leading tokens are in the cache already.

        The last token of `token_ids` never counts as cached, because sampling needs its logits.
        Without prefix caching the result is 0. The table lists the blocks of the cached tokens. If
        the cached tokens end inside a block, the table lists a new block instead of this block, and
        `take_copies` returns the `BlockCopy` from the cached block to the new block. Only requests
        with equal `cache_salt` share blocks. Until `release` the caller may append to `token_ids`.
        After the request's last `commit` the caller may also remove the last `token_ids`. If
        `caches_prefixes` is True, `begin`, `fits` and `pending` have a last argument
        `most: int | None = None`: at most this many leading tokens count as cached.
        """

    def fits(self, token_ids: list[int], cache_salt: str = "", most: int | None = None) -> bool:
        """Whether `begin` and then `grow` to the length of `token_ids` find enough blocks now.

        False must be right. A manager that does not know returns True, and `grow` tells. `pending`
        and `fits` may remember what they found for a list, to which the caller may only append. At
        most `most` tokens, which fill blocks, count as cached.
        """
        return True

    def abandon(self, token_ids: list[int]) -> None:  # noqa: B027  (nothing is remembered)
        """Forget what `pending` and `fits` found for a list whose request will not begin."""

    @abstractmethod
    def grow(self, request_id: int, num_tokens: int) -> bool:
        """Add blocks to the request's table until the table has room for `num_tokens` tokens.

        If too few blocks are free, add no block and return False. With a sliding window the table
        may get room for the first of the tokens only. Then `commit` extends the table.
        """

    def most_blocks(self, num_tokens: int) -> int:
        """Maximum number of blocks that a request of `num_tokens` tokens holds at a time."""
        return -(-num_tokens // self.block_size)

    def wanted(self, request_id: int, num_tokens: int) -> int:
        """Number of blocks that `grow` would add to the request's table; negative for none."""
        return -(-num_tokens // self.block_size) - len(self.table(request_id))

    def held(self, request_id: int) -> int:
        """Number of blocks in the request's table, without the entries `NO_BLOCK`."""
        return len(self.table(request_id)) - self.table(request_id).count(NO_BLOCK)

    @abstractmethod
    def table(self, request_id: int) -> list[int]:
        """A request's block table, for reading only. `NO_BLOCK` is the entry of a freed block."""

    @abstractmethod
    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """Record that the KV of the first `num_computed` tokens of `token_ids` has been written.

        The manager may now let other requests read the full blocks of these tokens, and may free
        blocks that no position from `num_computed` on attends to. Steps in flight write no KV at
        positions before `num_computed`. Rejected drafts never count as computed. The caller must
        call `commit` whenever the computed tokens fill another block.
        """

    @abstractmethod
    def release(self, request_id: int) -> None:
        """Release a request's blocks. The caller ensures that no step in flight uses the blocks."""

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """Return the block copies needed by the `begin` calls since the last call of `take_copies`.

        Omits copies for released requests. No source block is evicted before its copy is returned.
        """
        return ()

    def pending(self, token_ids: list[int], cache_salt: str = "") -> PendingPrefix | None:
        """Return a prefix of `token_ids` that a running request is computing for the cache.

        Returns None if there is no such prefix. If the running request ends before it has computed
        the whole prefix, the rest of the prefix is not cached.
        """
        return None

    def reset_prefix_cache(self) -> None:  # noqa: B027  (nothing to forget without caching)
        """Empty the prefix cache. Requests that are running now will add no blocks to the cache."""

    @property
    def stats(self) -> CacheStats:
        """Counters of the prefix cache; all 0 if the manager does not cache prefixes."""
        return CacheStats()


class Scheduler(ABC):
    """Decides what each step computes. A scheduler works on the CPU and never uses a device.

    The constructor takes the `Config`, the `BlockManager` and the runner's `Clock`. A scheduler
    must read no clock but this `Clock`: the clock of a simulated runner does not show real time.

    A request is in flight while a step in flight has a row of the request. A request in flight may
    get rows in further plans, but is not preempted. `commit` gets the plans in order of planning.

    The runner accepts at least one position of each decode row. Only `commit` tells the scheduler
    how many positions of a row were accepted. Before `commit` the scheduler reserves blocks as if
    all positions were accepted. If the steps in flight may bring a request to its length limit, the
    request gets no further row until `commit` shows that the request is below the limit. A request
    with logits processors gets no decode row while it is in flight.

    `commit` extends a request's `token_ids`, `token_times`, `logprobs`, `prompt_logprobs` and
    `values`. When a request ends, `commit` sets the request's `finish_reason`. If the result
    contains an error for a row, `commit` stores the error in `Sequence.error` and ends the row's
    request with finish_reason "error". A request with `max_tokens=0` gets no token, and ends with
    "length" when its last prefill chunk is committed. The scheduler also sets `admitted_at`,
    `num_cached` and `num_preemptions` of a request. `engine.running_batch` implements these rules.
    """

    name: ClassVar[str]  # the value of the option `scheduler`
    policies: ClassVar[Collection[str]] = ()  # names of the policy options that the scheduler uses

    @property
    @abstractmethod
    def has_unfinished(self) -> bool:
        """Whether any request is waiting, running or in flight."""

    @abstractmethod
    def add(self, seq: Sequence) -> None:
        """Queue a request. Raises RequestTooLongError if the request can never fit the cache."""

    @abstractmethod
    def schedule(self) -> StepPlan | None:
        """Plan the next step. Returns None if nothing can be planned now.

        The engine raises a StepError for None if requests are unfinished and no step is in flight.
        """

    @abstractmethod
    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Apply the result of the oldest plan in flight. Returns the requests that the result ends.

        A new token after a stop token or beyond the length limit is dropped, and so are its time,
        log-probabilities and values. Rows of requests that have already ended are ignored.
        """

    @abstractmethod
    def abort(self, request_id: int) -> Sequence | None:
        """End a request with finish_reason "abort". Returns None for unknown or ended requests."""


class ModelRunner(ABC):
    """Executes plans. Owns the model, the KV tensors, the device and the clock.

    The constructor takes the `Config` and the `Checkpoint`. After `close`, `execute` raises an
    EngineClosedError. `StepResult.ended_at` never decreases from one step to the next. A runner
    that overrides the clock `now` must also override `wait_until`.
    """

    name: ClassVar[str]  # the value of the option `model_runner`
    # Whether the runner drafts tokens for speculative decoding. If False, every decode row computes
    # one position, and the engine refuses the option `num_speculative_tokens`.
    drafts: ClassVar[bool] = False
    # Whether the runner uses a device. If False, options whose default depends on the machine get
    # the default of a machine without a GPU, so that runs are equal on all machines.
    has_device: ClassVar[bool] = True
    # Whether measurements show that no other request changes a request's bits. If False, the option
    # `check_exact` runs a test at start. A subclass of one of this repository's runners has to be
    # measured itself, and may then set `exact = True`.
    exact: bool = False
    # Number of the model's layers, if `SamplingParams.hidden_states` is supported; otherwise 0.
    hidden_layers: int = 0

    @property
    @abstractmethod
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        """For each cache group, the shape of its KV cache. All groups have the same block size."""

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepHandle:
        """Start a step. If possible, return before it ends. Steps run in the order of the calls."""

    # The engine's only clock: seconds since a fixed moment. The default is a plain function:
    # the scheduler stores `now`, and a stored bound method would keep the runner from being freed.
    now: Clock = staticmethod(time.perf_counter)

    def wait_until(self, moment: float) -> None:
        """Sleep until `now()` reaches `moment`. A simulated clock is moved to `moment` instead."""
        while (left := moment - self.now()) > 0:
            time.sleep(left)

    @abstractmethod
    def close(self) -> None:
        """Wait for the steps in flight and free all memory. If the runner is closed, do nothing."""
