"""A heap from which any item can be removed."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class LazyHeap(Generic[T]):
    """Items by rising key, the first pushed among equal keys; each item is in the heap once.

    A removed item's entry stays in the heap until it comes to the top, or until more than half of
    the heap is such entries. So every operation takes O(log n), amortized.
    """

    def __init__(self) -> None:
        self.heap: list[tuple[Any, int, T]] = []
        self._entries: dict[T, tuple[Any, int, T]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, key: Any, item: T) -> None:
        """Add an item, or move it to another key."""
        if item in self._entries:
            self.remove(item)
        self._count += 1
        self._entries[item] = entry = key, self._count, item
        heappush(self.heap, entry)

    def remove(self, item: T) -> None:
        """Remove an item that is in the heap."""
        del self._entries[item]
        if len(self.heap) > 2 * len(self._entries) + 64:
            self.heap = list(self._entries.values())
            heapify(self.heap)

    def first(self) -> T | None:
        """The item of the smallest key; None if there is none."""
        while self.heap:
            entry = self.heap[0]
            if self._entries.get(entry[2]) is entry:
                return entry[2]
            heappop(self.heap)
        return None

    def pop(self) -> tuple[Any, T]:
        """Remove the item of the smallest key, of which there is one; returns key and item."""
        self.first()
        key, _, item = heappop(self.heap)
        del self._entries[item]
        return key, item
