"""Eviction policies: which cached block is given up when space is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import ClassVar

from config import Config
from engine.types import KVGeometry
from utils.lazy_heap import LazyHeap

# Position at which a token's attention takes about as many FLOPs as its matrix products. There
# 4 * layers * heads * head_dim * position = 2 * parameters. For Qwen3-0.6B that is some 4,000.
_ATTENTION_PARITY_TOKENS = 4096


class CachedBlock:
    """A block of the prefix cache: later requests with the same prefix can find it."""

    __slots__ = ("__weakref__", "block", "depth", "digest", "hits", "parent", "tokens", "worth")

    def __init__(self, block: int, parent: CachedBlock | str, tokens: bytes) -> None:
        self.block = block  # block id; -1 after the block was evicted
        self.parent = parent  # the cached block before this block; for a first block the cache salt
        self.tokens = tokens  # the block's token ids, int32 each
        # number of blocks before this block
        self.depth: int = parent.depth + 1 if isinstance(parent, CachedBlock) else 0
        self.hits = 0  # number of requests that found this block in the cache
        self.digest = b""  # digest of parent and tokens; only for `PrefixCacheManager`
        self.worth = 0.0  # highest value among released children; only for `CostPolicy`


class EvictionPolicy(ABC):
    """Keeps the idle blocks (cached blocks that no request holds), and evicts one when asked.

    A block's parent is the block before it. A block whose parent was evicted cannot be found, so
    children should be evicted before their parent. A request releases its last block first. So a
    policy that evicts in the order of release evicts children before their parent.
    """

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, config: Config, geometry: KVGeometry) -> None: ...

    @abstractmethod
    def __len__(self) -> int:
        """The number of idle blocks."""

    @abstractmethod
    def add(self, block: CachedBlock) -> None:
        """Take in a block that no request holds any more."""

    @abstractmethod
    def remove(self, block: CachedBlock) -> None:
        """Remove a block that a request holds again, or that is not cached any more."""

    @abstractmethod
    def pop(self) -> CachedBlock:
        """Choose an idle block to evict, remove it and return it."""


class LRUPolicy(EvictionPolicy):
    """Evicts the block that was released longest ago. Every operation takes constant time."""

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
    """Evicts the block with the lowest `value`; among equal values the block released first."""

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        self.blocks: LazyHeap[CachedBlock] = LazyHeap()

    @abstractmethod
    def value(self, block: CachedBlock) -> float:
        """The worth of keeping the block. Called each time that its last holder releases the block.

        The value stays until a request finds the block, or until the block is evicted.
        """

    def __len__(self) -> int:
        return len(self.blocks)

    def add(self, block: CachedBlock) -> None:
        self.blocks.push(self.value(block), block)

    def remove(self, block: CachedBlock) -> None:
        self.blocks.remove(block)

    def pop(self) -> CachedBlock:
        return self.blocks.pop()[1]


class LFUPolicy(LowestFirst):
    """Evicts the block that fewest requests found. No child is found more often than its parent."""

    name = "lfu"

    def value(self, block: CachedBlock) -> float:
        return block.hits


class CostPolicy(LowestFirst):
    """Evicts the block with the lowest value, computed from recomputation cost, hits and age.

    The policy is GreedyDual-Size with frequency (Cao and Irani, USITS 1997; Cherkasova, 1998). A
    block's value is its cost times (1 + hits), plus the value of the block evicted last. This last
    term rises with time, so blocks released later get higher values than old blocks. The cost rises
    with the block's depth, because later positions attend to more tokens.
    """

    name = "cost"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._cost_per_depth = geometry.block_size / _ATTENTION_PARITY_TOKENS
        self._floor = 0.0

    def value(self, block: CachedBlock) -> float:
        own = self._floor + (1 + block.hits) * (1 + block.depth * self._cost_per_depth)
        # Without its parent a block is not found. So a parent is worth at least as much as a child.
        value = max(own, block.worth)
        if isinstance(block.parent, CachedBlock):
            block.parent.worth = max(value, block.parent.worth)
        return value

    def pop(self) -> CachedBlock:
        self._floor, block = self.blocks.pop()
        return block
