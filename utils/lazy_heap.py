"""A heap from which any item can be removed."""

from __future__ import annotations

import heapq
import itertools
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class LazyHeap(Generic[T]):
    """Items by rising key, among equal keys the first pushed; each item is in the heap once.

    A removed item's entry stays until it comes to the top, or until more than half of the heap is
    such entries. So every operation takes O(log n), amortized.
    """

    def __init__(self) -> None:
        self.heap: list[tuple[Any, int, T]] = []
        # Of each item the number of its entry, which tells it from entries of its past.
        self._numbers: dict[T, int] = {}
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._numbers)

    def push(self, key: Any, item: T) -> None:
        """Add an item, or move it to another key."""
        if item in self._numbers:
            self.remove(item)
        self._numbers[item] = number = next(self._count)
        heapq.heappush(self.heap, (key, number, item))

    def remove(self, item: T) -> None:
        """Remove an item that is in the heap."""
        del self._numbers[item]
        if len(self.heap) > 2 * len(self._numbers) + 64:
            self.heap = [e for e in self.heap if self._numbers.get(e[2]) == e[1]]
            heapq.heapify(self.heap)

    def first(self) -> T | None:
        """The item of the smallest key, if any."""
        while self.heap:
            _, number, item = self.heap[0]
            if self._numbers.get(item) == number:
                return item
            heapq.heappop(self.heap)
        return None

    def pop(self) -> tuple[Any, T]:
        """Remove the item of the smallest key, of which there is one; returns key and item."""
        self.first()
        key, _, item = heapq.heappop(self.heap)
        del self._numbers[item]
        return key, item
