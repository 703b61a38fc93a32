from __future__ import annotations

import random

from utils.lazy_heap import LazyHeap


def test_items_come_by_key_and_then_in_order_of_pushing() -> None:
    heap: LazyHeap[str] = LazyHeap()
    for key, item in ((2, "c"), (1, "b"), (2, "a"), (0, "d")):
        heap.push(key, item)
    assert heap.first() == "d"
    assert [heap.pop() for _ in range(4)] == [(0, "d"), (1, "b"), (2, "c"), (2, "a")]
    assert (heap.first(), len(heap)) == (None, 0)


def test_an_item_that_is_pushed_again_moves() -> None:
    heap: LazyHeap[str] = LazyHeap()
    heap.push(1, "a")
    heap.push(2, "b")
    heap.push(3, "a")
    assert [heap.pop() for _ in range(2)] == [(2, "b"), (3, "a")]
    assert heap.first() is None


def test_it_is_a_sorted_list_with_removal() -> None:
    rng, heap, known = random.Random(0), LazyHeap[int](), dict[int, int]()
    for item in range(3000):
        heap.push(known.setdefault(item, rng.randrange(50)), item)
        if rng.random() < 0.4:
            gone = rng.choice(list(known))
            heap.remove(gone)
            del known[gone]
        if known and rng.random() < 0.3:
            first = heap.first()
            assert first is not None
            key, item = heap.pop()
            assert (first, key) == (item, min(known.values()))
            assert known.pop(item) == key
        assert len(heap) == len(known)
        assert len(heap.heap) <= 2 * len(known) + 65


def test_what_was_removed_is_not_kept() -> None:
    heap: LazyHeap[int] = LazyHeap()
    for item in range(1000):
        heap.push(item % 7, item)
    for item in range(1000):
        heap.remove(item)
    assert len(heap.heap) <= 64
