"""Eviction policies: which cached block is given up when space is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import ClassVar

from config import Config
from engine.types import KVGeometry
from utils.lazy_heap import LazyHeap

# At this position a token's attention takes about as many FLOPs as its matrix products:
# 4 * layers * heads * head_dim * position = 2 * parameters. Qwen3-0.6B gives some 4,000.
_ATTENTION_PARITY_TOKENS = 4096


class CachedBlock:
    """A block of the prefix cache: later requests with the same prefix can find it."""

    __slots__ = ("__weakref__", "block", "depth", "digest", "hits", "parent", "tokens", "worth")

    def __init__(self, block: int, parent: CachedBlock | str, tokens: bytes) -> None:
        self.block = block  # block id; -1 after the block was evicted
        self.parent = parent  # the cached block before this block; for a first block the cache salt
        self.tokens = tokens  # the block's token ids, int32 each
        self.depth: int = (
            parent.depth + 1 if isinstance(parent, CachedBlock) else 0
        )  # number of blocks before this block
        self.hits = 0  # number of requests that found this block
        self.digest = b""  # digest of parent and tokens; only for `PrefixCacheManager`
        self.worth = 0.0  # highest value of a released child; only for `CostPolicy`


class EvictionPolicy(ABC):
    """Keeps the idle blocks (cached blocks that no request holds), and evicts one when asked.

    A block can be found only through its parent, the block before it. So children should be evicted
    before their parent. Requests release their last block first. So a policy that evicts in the
    order of release evicts children first.
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
        """Remove a block, because a request found it or because it is not cached any more."""

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
        """How much it is worth to keep the block. Called once, when the block is released."""

    def __len__(self) -> int:
        return len(self.blocks)

    def add(self, block: CachedBlock) -> None:
        self.blocks.push(self.value(block), block)

    def remove(self, block: CachedBlock) -> None:
        self.blocks.remove(block)

    def pop(self) -> CachedBlock:
        return self.blocks.pop()[1]


class LFUPolicy(LowestFirst):
    """Evicts the block that the fewest requests found. No child has more hits than its parent."""

    name = "lfu"

    def value(self, block: CachedBlock) -> float:
        return block.hits


class CostPolicy(LowestFirst):
    """Evicts the block that is cheapest to recompute, weighted by its hits and its age.

    GreedyDual-Size with frequency (Cao and Irani, USITS 1997; Cherkasova, 1998). A block's value is
    its cost times its uses, plus the value of the block evicted last. So blocks released later get
    higher values than unused old blocks. A deeper block costs more, because of its attention.
    """

    name = "cost"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._cost_per_depth = geometry.block_size / _ATTENTION_PARITY_TOKENS
        self._floor = 0.0

    def value(self, block: CachedBlock) -> float:
        own = self._floor + (1 + block.hits) * (1 + block.depth * self._cost_per_depth)
        # A block is useless without its parent. So a parent is worth at least as much as a child.
        value = max(own, block.worth)
        if isinstance(block.parent, CachedBlock):
            block.parent.worth = max(value, block.parent.worth)
        return value

    def pop(self) -> CachedBlock:
        self._floor, block = self.blocks.pop()
        return block
