"""The contracts of the engine and the values that pass between its parts.

A scheduler writes a `StepPlan`, a runner executes it behind a `StepHandle`, and a commit turns
the `StepResult` back into request state. Nothing here needs a device or a model, so a scheduler
or a block manager can be written and tested against this file alone.

Vocabulary: a *slot* is the row of a request in the runner's per-request tables, held while the
request runs. A *position* is a token's index in its request (prompt first). A *block* is
`block_size` consecutive positions of KV cache; a request's *block table* lists its blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.sequence import Sequence


# Token id -> log-probability in one place: the token that stands there first, then the most likely
# ones in falling order.
TokenLogprobs = dict[int, float]


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """Shape of a paged KV cache; K and V of `num_layers` layers in `num_blocks` blocks.

    Attributes:
        dtype_bytes: bytes per element.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int
    dtype_bytes: int

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes over all layers, K and V."""
        token = 2 * self.num_kv_heads * self.head_dim * self.dtype_bytes
        return self.num_layers * self.block_size * token


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request enters a slot; sent once, so that later steps name the slot alone.

    Attributes:
        token_ids: all tokens known so far: the prompt and, after a preemption, the output.
        seed: key of the request's sampling noise, 0 <= seed < 2**63.
        num_output_tokens: how many of the tokens are output.
        stop_token_ids: what may not be sampled before `sampling.min_tokens`; empty without it.
    """

    slot: int
    request_id: int
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    num_output_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """`block_ids` become entries `first_index`, `first_index + 1`, ... of a slot's block table."""

    slot: int
    first_index: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """All positions of block `source`, in every layer, are copied to block `target`."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute positions [start, start + num_tokens) of a slot; earlier ones are in the cache.

    Attributes:
        samples: the chunk reaches the end of the known tokens, so the next one is sampled.
    """

    slot: int
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the model, as pure data: what changed, then what to compute.

    A runner applies `new_requests`, then `block_updates`, then makes the `block_copies`, then
    computes the rows: the prefill chunks in order, then for each slot in `decode` the one
    position after those computed so far, whose token the runner itself sampled (or received)
    before.

    Attributes:
        step_id: 0, 1, 2, ... in order of planning; from 0 again after an exception, which ends all
            requests and steps.
        block_copies: in any order; no target is a source or another one's target. What a source
            holds was written by earlier steps; later ones may write to it.
        poisoned_blocks: blocks to fill with NaN before anything else; only the KV sanitizer
            sets it.
    """

    step_id: int
    new_requests: tuple[NewRequest, ...] = ()
    block_updates: tuple[BlockUpdate, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[int, ...] = ()
    block_copies: tuple[BlockCopy, ...] = ()
    poisoned_blocks: tuple[int, ...] = ()

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens computed for prompts (and for recomputation after a preemption)."""
        return sum(chunk.num_tokens for chunk in self.prefill)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return self.num_prefill_tokens + len(self.decode)

    @property
    def sampled_slots(self) -> list[int]:
        """Slots that get new tokens, in the order of `StepResult.tokens`."""
        return [chunk.slot for chunk in self.prefill if chunk.samples] + list(self.decode)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced.

    Attributes:
        tokens: for each of the plan's `sampled_slots`, in order, its new tokens (at least one).
        logprobs: as `tokens`, for each token its log-probabilities; empty lists for requests that
            did not ask for any, None if no request did.
        prompt_logprobs: for each of the plan's prefill chunks, those of the prompt's tokens at
            start + 1, start + 2, ..., which the chunk's positions predict; else as `logprobs`.
    """

    step_id: int
    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs]] | None = None
    prompt_logprobs: list[list[TokenLogprobs]] | None = None


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

    Requests are known by their `request_id`. A request's life is `begin`, any number of `grow`
    and `commit`, then `release`. All calls are made between steps, from one thread.
    """

    name: ClassVar[str]
    caches_prefixes: ClassVar[bool] = False

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks in all."""

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks that `grow` could hand out now, reusable cached ones included."""

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
        """Extend the table to hold `num_tokens` tokens; False, and no change, if out of blocks."""

    @abstractmethod
    def table(self, request_id: int) -> list[int]:
        """The block table; the caller must not change it."""

    @abstractmethod
    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """The KV of the first `num_computed` of `token_ids` is known to be written.

        From here on full blocks of them may be shared with other requests.
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

    Between `schedule` and `commit` of a plan its requests are *in flight*: they may be planned
    again, but neither preempted nor released. Plans are committed in the order of planning.
    After an exception the engine makes a new scheduler and a new block manager.

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
        """The next step, or None if nothing can be planned before something is committed."""

    @abstractmethod
    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Take in the oldest plan's result; returns the requests that finished with it."""

    @abstractmethod
    def abort(self, request_id: int) -> Sequence | None:
        """End a request with finish_reason "abort"; None if it is unknown or has finished.

        What is in flight for it is discarded when committed.
        """


class ModelRunner(ABC):
    """Executes plans. Owns the model, the KV tensors and the device."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def kv_geometry(self) -> KVGeometry:
        """The KV cache that plans may use."""

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepHandle:
        """Start a step and return at once. Steps take effect in the order of these calls."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is in flight and give all memory back; may be called twice."""
