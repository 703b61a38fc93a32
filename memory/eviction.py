"""Eviction policies: they choose the cached block to evict when no KV block is free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import ClassVar

from config import Config
from engine.types import KVGeometry
from utils.lazy_heap import LazyHeap

# Position at which attention takes about as many FLOPs per token as the products with weights:
# 4 * layers * heads * head_dim * position = 2 * parameters. Qwen3-0.6B: some 4,000 tokens.
_ATTENTION_PARITY_TOKENS = 4096


class CachedBlock:
    """A block in the prefix cache. Later requests with the same prefix can use the block."""

    __slots__ = ("__weakref__", "block", "depth", "digest", "hits", "parent", "tokens", "worth")

    def __init__(self, block: int, parent: CachedBlock | str, tokens: bytes) -> None:
        self.block = block  # block id; -1 after the block was evicted
        self.parent = parent  # the preceding cached block; for a first block the cache salt
        self.tokens = tokens  # the block's token ids as int32 bytes
        # number of blocks that precede this block in its prefix
        self.depth: int = parent.depth + 1 if isinstance(parent, CachedBlock) else 0
        self.hits = 0  # number of requests that found this block in the cache
        self.digest = b""  # digest of parent and tokens, used by `PrefixCacheManager` only
        self.worth = 0.0  # highest value that `CostPolicy` has computed for a child of this block


class EvictionPolicy(ABC):
    """Keeps the idle blocks, and chooses which idle block is evicted.

    An idle block is a cached block that no request holds. A block's parent is the preceding block
    of its prefix. A block cannot be found after its parent was evicted, so a block should be
    evicted before its parent. A request releases its last block first, so a policy that evicts
    blocks in the order of their release evicts each block before its parent.
    """

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, config: Config, geometry: KVGeometry) -> None: ...

    @abstractmethod
    def __len__(self) -> int:
        """The number of idle blocks."""

    @abstractmethod
    def add(self, block: CachedBlock) -> None:
        """Add a cached block that no request holds any more."""

    @abstractmethod
    def remove(self, block: CachedBlock) -> None:
        """Remove a block from the idle blocks: a request uses it again, or it left the cache."""

    @abstractmethod
    def pop(self) -> CachedBlock:
        """Choose the idle block to evict, remove the block from the idle blocks, and return it."""


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
    """Evicts the block with the lowest `value`; of equal values, the block released earliest."""

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        self.blocks: LazyHeap[CachedBlock] = LazyHeap()

    @abstractmethod
    def value(self, block: CachedBlock) -> float:
        """Return the block's value. Called when the last request that holds the block releases it.

        The value does not change until a request uses the block again or the block is evicted.
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
    """Evicts the block that the fewest requests have found in the cache."""

    name = "lfu"

    def value(self, block: CachedBlock) -> float:
        return block.hits


class CostPolicy(LowestFirst):
    """Evicts the block with the lowest value, computed from recomputation cost, hits and age.

    The policy is GreedyDual-Size with frequency (Cao and Irani, USITS 1997; Cherkasova, 1998). A
    block's value is its recomputation cost times (1 + hits), plus the value of the block evicted
    last. Values of evicted blocks rise with time, so blocks released later get higher values. The
    cost rises with the number of preceding blocks: later positions attend to more tokens.
    """

    name = "cost"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._cost_per_depth = geometry.block_size / _ATTENTION_PARITY_TOKENS
        self._floor = 0.0

    def value(self, block: CachedBlock) -> float:
        own = self._floor + (1 + block.hits) * (1 + block.depth * self._cost_per_depth)
        # A block cannot be found without its parent, so a parent gets at least a child's value.
        value = max(own, block.worth)
        if isinstance(block.parent, CachedBlock):
            block.parent.worth = max(value, block.parent.worth)
        return value

    def pop(self) -> CachedBlock:
        self._floor, block = self.blocks.pop()
        return block
