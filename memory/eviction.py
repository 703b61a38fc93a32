"""Which cached block is given up when space is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import ClassVar

from config import Config
from engine.types import KVGeometry
from utils.lazy_heap import LazyHeap

# Position at which a token's attention costs about as much as its matrix products: 4 * layers *
# heads * head_dim * position = 2 * parameters; some 4,000 in the shape of Qwen3-0.6B.
_ATTENTION_PARITY_TOKENS = 4096


class CachedBlock:
    """A block whose content is known and may be found again."""

    __slots__ = ("__weakref__", "block", "depth", "digest", "hits", "parent", "tokens", "worth")

    def __init__(self, block: int, parent: CachedBlock | str, tokens: bytes) -> None:
        self.block = block  # its id; -1 once it has been given up
        self.parent = parent  # the cached block before it; of a request's first the cache salt
        self.tokens = tokens  # its token ids, int32 each
        self.depth: int = (
            parent.depth + 1 if isinstance(parent, CachedBlock) else 0
        )  # blocks before
        self.hits = 0  # requests that found it
        self.digest = b""  # of parent and tokens, for `PrefixCacheManager`
        self.worth = 0.0  # for `CostPolicy`: what a block behind it was worth when released


class EvictionPolicy(ABC):
    """Holds the cached blocks that no request holds, and chooses among them.

    What is cached behind a block cannot be found without it, so children should go before their
    parent. A request releases its last block first, so a policy that treats blocks alike keeps
    that order.
    """

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, config: Config, geometry: KVGeometry) -> None: ...

    @abstractmethod
    def __len__(self) -> int:
        """Blocks held here."""

    @abstractmethod
    def add(self, block: CachedBlock) -> None:
        """No request holds the block any more."""

    @abstractmethod
    def remove(self, block: CachedBlock) -> None:
        """A request found it, or it is not cached any more."""

    @abstractmethod
    def pop(self) -> CachedBlock:
        """Choose a block to give up, and remove it."""


class LRUPolicy(EvictionPolicy):
    """The block that was released longest ago, in constant time."""

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
    """The block of the lowest `value` when it was released, among equals the earliest."""

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        self.blocks: LazyHeap[CachedBlock] = LazyHeap()

    @abstractmethod
    def value(self, block: CachedBlock) -> float:
        """What keeping the block is worth."""

    def __len__(self) -> int:
        return len(self.blocks)

    def add(self, block: CachedBlock) -> None:
        self.blocks.push(self.value(block), block)

    def remove(self, block: CachedBlock) -> None:
        self.blocks.remove(block)

    def pop(self) -> CachedBlock:
        return self.blocks.pop()[1]


class LFUPolicy(LowestFirst):
    """The block that the fewest requests found; a parent is found whenever its child is."""

    name = "lfu"

    def value(self, block: CachedBlock) -> float:
        return block.hits


class CostPolicy(LowestFirst):
    """The block that is cheapest to compute again, weighed by its hits, and ageing.

    GreedyDual-Size with frequency (Cao and Irani, USITS 1997; Cherkasova, 1998): a block is
    worth its cost times its uses, on top of what the last one given up was worth. So everything
    unused sinks. The deeper a block, the more its attention costs.
    """

    name = "cost"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._cost_per_depth = geometry.block_size / _ATTENTION_PARITY_TOKENS
        self._floor = 0.0

    def value(self, block: CachedBlock) -> float:
        own = self._floor + (1 + block.hits) * (1 + block.depth * self._cost_per_depth)
        # A block is of no use without those before it: a parent is worth what its children are.
        value = max(own, block.worth)
        if isinstance(block.parent, CachedBlock):
            block.parent.worth = max(value, block.parent.worth)
        return value

    def pop(self) -> CachedBlock:
        self._floor, block = self.blocks.pop()
        return block
