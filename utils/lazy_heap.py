"""A heap from which any item can be removed."""

from __future__ import annotations

import heapq
import itertools
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class LazyHeap(Generic[T]):
    """A heap with the smallest key first. Items with equal keys are popped in the order of `push`.

    An item is in the heap at most once. When an item is removed, its entry stays in the list `heap`
    and is called stale. A stale entry is deleted when it becomes the first entry of the list. All
    stale entries are deleted if they outnumber the items by more than 64. So with n items an
    operation takes O(log n) amortised time.
    """

    def __init__(self) -> None:
        self.heap: list[tuple[Any, int, T]] = []
        # An entry (key, number, item) of `heap` is stale if `_numbers.get(item)` is not `number`.
        self._numbers: dict[T, int] = {}
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, item: T) -> bool:
        return item in self._numbers

    def push(self, key: Any, item: T) -> None:
        """Add an item. If the item is in the heap already, give the item a new key."""
        if item in self._numbers:
            self.remove(item)
        self._numbers[item] = number = next(self._count)
        heapq.heappush(self.heap, (key, number, item))

    def remove(self, item: T) -> None:
        """Remove an item, which must be in the heap."""
        del self._numbers[item]
        if len(self.heap) > 2 * len(self._numbers) + 64:
            self.heap = [e for e in self.heap if self._numbers.get(e[2]) == e[1]]
            heapq.heapify(self.heap)

    def first(self) -> T | None:
        """Return the item with the smallest key, or None if the heap is empty."""
        while self.heap:
            _, number, item = self.heap[0]
            if self._numbers.get(item) == number:
                return item
            heapq.heappop(self.heap)
        return None

    def pop(self) -> tuple[Any, T]:
        """Remove the item with the smallest key, and return (key, item). IndexError if empty."""
        self.first()
        key, _, item = heapq.heappop(self.heap)
        del self._numbers[item]
        return key, item
