"""Which cached block is given up when space is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from heapq import heapify, heappop, heappush
from typing import ClassVar
from weakref import WeakKeyDictionary

from config import Config
from engine.types import KVGeometry

# Where the attention of one token costs about as much as all its matrix products: 4 * layers *
# heads * head_dim * position against 2 * parameters, some 4,000 in the shape of Qwen3-0.6B.
_ATTENTION_PARITY_TOKENS = 4096


class CachedBlock:
    """A block whose content is known and may be found again.

    Attributes:
        block: its id; -1 once it has been given up.
        parent: the cached block before it; of a request's first block the cache salt.
        tokens: its token ids, int32 each.
        depth: blocks before it.
        hits: requests that found it.
        digest: of parent and tokens, for those who look it up that way.
    """

    __slots__ = ("__weakref__", "block", "depth", "digest", "hits", "parent", "tokens")

    def __init__(self, block: int, parent: CachedBlock | str, tokens: bytes) -> None:
        self.block = block
        self.parent = parent
        self.tokens = tokens
        self.depth: int = parent.depth + 1 if isinstance(parent, CachedBlock) else 0
        self.hits = 0
        self.digest = b""


class EvictionPolicy(ABC):
    """Holds the cached blocks that no request holds, and chooses among them.

    What is cached behind a block cannot be found without it, so children should go before their
    parent. A request gives its blocks up last one first: those that share their fate come in
    that order.

    Args:
        config: the engine's options.
        geometry: of the KV cache.
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
    """The block that was released longest ago; every operation takes constant time."""

    name = "lru"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        del config, geometry
        self._blocks: OrderedDict[CachedBlock, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, block: CachedBlock) -> None:
        self._blocks[block] = None

    def remove(self, block: CachedBlock) -> None:
        del self._blocks[block]

    def pop(self) -> CachedBlock:
        return self._blocks.popitem(last=False)[0]


class LowestFirst(EvictionPolicy):
    """The block of the lowest `value` when it was released, among equals the earliest."""

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        del config, geometry
        # Removed blocks stay in the heap until they surface; the number tells them from later
        # entries of the same block.
        self._heap: list[tuple[float, int, CachedBlock]] = []
        self._entries: dict[CachedBlock, int] = {}
        self._count = 0

    @abstractmethod
    def value(self, block: CachedBlock) -> float:
        """What keeping the block is worth."""

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, block: CachedBlock) -> None:
        self._count += 1
        self._entries[block] = self._count
        heappush(self._heap, (self.value(block), self._count, block))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapify(self._heap)

    def remove(self, block: CachedBlock) -> None:
        del self._entries[block]

    def pop(self) -> CachedBlock:
        return self._pop_entry()[2]

    def _pop_entry(self) -> tuple[float, int, CachedBlock]:
        while not self._is_current(entry := heappop(self._heap)):
            pass
        del self._entries[entry[2]]
        return entry

    def _is_current(self, entry: tuple[float, int, CachedBlock]) -> bool:
        return self._entries.get(entry[2]) == entry[1]


class LFUPolicy(LowestFirst):
    """The block that the fewest requests found; a parent is found whenever its child is."""

    name = "lfu"

    def value(self, block: CachedBlock) -> float:
        return block.hits


class CostPolicy(LowestFirst):
    """The block that is cheapest to compute again, weighed by its hits, and ageing.

    GreedyDual-Size with frequency (Cao and Irani, USITS 1997; Cherkasova, 1998): a block is
    worth its cost times its uses on top of what the last one given up was worth, so that
    everything unused sinks. The cost of a block grows with its depth by attention.
    """

    name = "cost"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._cost_per_depth = geometry.block_size / _ATTENTION_PARITY_TOKENS
        self._floor = 0.0
        # Weakly: a block that is forgotten need not come by here.
        self._behind: WeakKeyDictionary[CachedBlock, float] = WeakKeyDictionary()

    def value(self, block: CachedBlock) -> float:
        own = self._floor + (1 + block.hits) * (1 + block.depth * self._cost_per_depth)
        # Deeper blocks cost more and need those before them: a parent is worth what its
        # children are.
        value: float = max(own, self._behind.get(block, 0.0))
        if isinstance(block.parent, CachedBlock):
            self._behind[block.parent] = max(value, self._behind.get(block.parent, 0.0))
        return value

    def pop(self) -> CachedBlock:
        self._floor, _, block = self._pop_entry()
        self._behind.pop(block, None)
        return block
