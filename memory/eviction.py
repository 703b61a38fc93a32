"""Eviction policies choose a cached block to evict if a request needs a block and none is free.

Requests with equal first tokens can share the blocks of the prefix cache. A cached block is *idle*
if no running request has it in its block table. Only idle blocks are *evicted*, i.e. removed from
the prefix cache. A block's *parent* is the cached block directly before it in the prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import ClassVar

from config import Config
from engine.types import KVGeometry
from utils.lazy_heap import LazyHeap

# Position at which a token's attention takes as many FLOPs as its products with the weights, i.e.
# 4 * layers * heads * head_dim * position = 2 * number of weights. Qwen3-0.6B's is about 4,000.
_ATTENTION_PARITY_TOKENS = 4096


class CachedBlock:
    """A full KV block in the prefix cache."""

    __slots__ = ("__weakref__", "block", "depth", "digest", "hits", "parent", "tokens", "worth")

    def __init__(self, block: int, parent: CachedBlock | str, tokens: bytes) -> None:
        self.block = block  # block id; -1 after the block was evicted
        self.parent = parent  # block before this one; of a first block: the request's `cache_salt`
        self.tokens = tokens  # the block's token ids as int32 bytes
        # number of blocks before this block in the prompt
        self.depth: int = parent.depth + 1 if isinstance(parent, CachedBlock) else 0
        self.hits = 0  # number of requests that found this block in the cache
        self.digest = b""  # hash of parent and tokens; only `PrefixCacheManager` uses it
        self.worth = 0.0  # for `CostPolicy`: highest value of a block whose parent is this block


class EvictionPolicy(ABC):
    """Keeps the set of idle blocks, and chooses the idle block to evict.

    The prefix cache cannot find a block after the block's parent was evicted. So a block should be
    evicted before its parent. When a request ends, its last block becomes idle first, and its first
    block last. So a policy that evicts the longest idle block evicts each block before its parent.
    """

    name: ClassVar[str]  # the value of the option `eviction_policy`

    @abstractmethod
    def __init__(self, config: Config, geometry: KVGeometry) -> None: ...

    @abstractmethod
    def __len__(self) -> int:
        """The number of idle blocks."""

    @abstractmethod
    def add(self, block: CachedBlock) -> None:
        """Add a cached block that has become idle."""

    @abstractmethod
    def remove(self, block: CachedBlock) -> None:
        """Remove an idle block that a request now holds, or that has left the prefix cache."""

    @abstractmethod
    def pop(self) -> CachedBlock:
        """Choose an idle block to evict, remove it from the set of idle blocks, and return it."""


class LRUPolicy(EvictionPolicy):
    """Evicts the block that has been idle longest. Each method takes constant time."""

    name = "lru"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        self.blocks: OrderedDict[CachedBlock, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.blocks)

    def add(self, block: CachedBlock) -> None:
        self.blocks[block] = None

    def remove(self, block: CachedBlock) -> None:
        del self.blocks[block]

    def pop(self) -> CachedBlock:
        return self.blocks.popitem(last=False)[0]


class LowestFirst(EvictionPolicy):
    """Evicts the idle block of lowest `value`. On a tie evicts the block that became idle first."""

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        self.blocks: LazyHeap[CachedBlock] = LazyHeap()

    @abstractmethod
    def value(self, block: CachedBlock) -> float:
        """Return a block's value. `add` calls `value` once, when the block becomes idle."""

    def __len__(self) -> int:
        return len(self.blocks)

    def add(self, block: CachedBlock) -> None:
        self.blocks.push(self.value(block), block)

    def remove(self, block: CachedBlock) -> None:
        self.blocks.remove(block)

    def pop(self) -> CachedBlock:
        return self.blocks.pop()[1]


class LFUPolicy(LowestFirst):
    """Evicts the idle block that the fewest requests have found in the prefix cache."""

    name = "lfu"

    def value(self, block: CachedBlock) -> float:
        return block.hits


class CostPolicy(LowestFirst):
    """Evicts the idle block with the lowest value: cost * (1 + hits) + floor.

    The policy is GreedyDual-Size with frequency (Cao and Irani, USITS 1997; Cherkasova, 1998). The
    cost of recomputing a block rises with its position, because later positions attend to more
    tokens. `hits` is the number of requests that found the block in the cache. The floor is the
    value of the block evicted last. The floor never falls, so a block that became idle earlier
    tends to have a lower value.
    """

    name = "cost"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._cost_per_depth = geometry.block_size / _ATTENTION_PARITY_TOKENS
        self._floor = 0.0

    def value(self, block: CachedBlock) -> float:
        own = self._floor + (1 + block.hits) * (1 + block.depth * self._cost_per_depth)
        # The value is at least `worth`, so that no block is evicted before one whose parent it is.
        value = max(own, block.worth)
        if isinstance(block.parent, CachedBlock):
            block.parent.worth = max(value, block.parent.worth)
        return value

    def pop(self) -> CachedBlock:
        self._floor, block = self.blocks.pop()
        return block
