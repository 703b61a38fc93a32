"""The contract of a block manager, on the plain one; no torch."""

from __future__ import annotations

import random

import pytest

from config import Config
from engine.types import BlockManager, KVGeometry
from memory.block_manager import PagedBlockManager, PrefixCacheManager


def _blocks(num_blocks: int = 8, block_size: int = 16) -> PagedBlockManager:
    return PagedBlockManager(
        Config(model="none"), KVGeometry(1, 1, 1, block_size, num_blocks, dtype_bytes=4)
    )


def test_all_blocks_are_free_at_first() -> None:
    blocks = _blocks(5, 32)
    assert (blocks.num_blocks, blocks.num_free_blocks, blocks.block_size) == (5, 5, 32)


def test_begin_finds_nothing_cached_and_takes_nothing() -> None:
    blocks = _blocks()
    assert blocks.begin(0, list(range(100))) == 0
    assert blocks.table(0) == []
    assert blocks.num_free_blocks == 8
    assert not PagedBlockManager.caches_prefixes


@pytest.mark.parametrize(("num_tokens", "count"), [(0, 0), (1, 1), (16, 1), (17, 2), (128, 8)])
def test_grow_takes_as_many_blocks_as_the_tokens_need(num_tokens: int, count: int) -> None:
    blocks = _blocks()
    blocks.begin(0, [])
    assert blocks.grow(0, num_tokens)
    assert len(blocks.table(0)) == count
    assert blocks.num_free_blocks == 8 - count


def test_grow_keeps_the_blocks_there_are() -> None:
    blocks = _blocks()
    blocks.begin(0, [])
    blocks.grow(0, 20)
    before = list(blocks.table(0))
    assert blocks.grow(0, 32)
    assert blocks.table(0) == before
    assert blocks.grow(0, 33)
    assert blocks.table(0)[:2] == before
    assert blocks.grow(0, 5)
    assert len(blocks.table(0)) == 3


def test_a_grow_that_fails_changes_nothing() -> None:
    blocks = _blocks(4)
    blocks.begin(0, [])
    blocks.begin(1, [])
    blocks.grow(0, 40)
    before = list(blocks.table(0))
    assert not blocks.grow(1, 17)
    assert not blocks.grow(0, 65)
    assert (blocks.table(0), blocks.table(1), blocks.num_free_blocks) == (before, [], 1)
    assert blocks.grow(1, 16)


def test_no_block_is_held_twice() -> None:
    blocks = _blocks()
    for request_id in range(4):
        blocks.begin(request_id, [])
        blocks.grow(request_id, 32)
    held = [block for request_id in range(4) for block in blocks.table(request_id)]
    assert sorted(held) == list(range(8))


def test_release_gives_all_blocks_back() -> None:
    blocks = _blocks()
    blocks.begin(0, [])
    blocks.grow(0, 100)
    blocks.release(0)
    assert blocks.num_free_blocks == 8


def test_released_blocks_come_back_first_and_in_order() -> None:
    blocks = _blocks()
    blocks.begin(0, [])
    blocks.grow(0, 48)
    held = list(blocks.table(0))
    blocks.release(0)
    blocks.begin(1, [])
    blocks.grow(1, 48)
    assert blocks.table(1) == held


def test_release_twice_fails() -> None:
    blocks = _blocks()
    blocks.begin(0, [])
    blocks.grow(0, 16)
    blocks.release(0)
    with pytest.raises(KeyError):
        blocks.release(0)
    assert blocks.num_free_blocks == 8


def test_release_of_a_block_that_is_free_already_fails() -> None:
    blocks = _blocks()
    for request_id in (0, 1):
        blocks.begin(request_id, [])
    blocks.grow(0, 16)
    blocks.table(1).append(blocks.table(0)[0])
    blocks.release(0)
    with pytest.raises(AssertionError, match="free block"):
        blocks.release(1)


def test_a_block_that_two_requests_hold_stays_until_both_release_it() -> None:
    blocks = PrefixCacheManager(Config(model="none"), KVGeometry(1, 1, 1, 16, 8, 4))
    tokens = [1] * 17
    blocks.begin(0, tokens)
    blocks.grow(0, 17)
    blocks.commit(0, tokens, 16)
    assert blocks.begin(1, tokens) == 16
    assert blocks.table(1) == blocks.table(0)[:1]
    blocks.release(0)
    assert blocks.num_free_blocks == 7
    blocks.release(1)
    assert blocks.num_free_blocks == 8


def test_begin_twice_fails() -> None:
    blocks = _blocks()
    blocks.begin(0, [])
    with pytest.raises(AssertionError, match="begun"):
        blocks.begin(0, [])


def test_requests_that_are_unknown_fail() -> None:
    with pytest.raises(KeyError):
        _blocks().grow(3, 1)
    with pytest.raises(KeyError):
        _blocks().table(3)


def test_managers_share_nothing() -> None:
    first, second = _blocks(4, 16), _blocks(6, 32)
    first.begin(0, [])
    first.grow(0, 64)
    assert (second.num_free_blocks, second.block_size, first.block_size) == (6, 32, 16)


def test_any_order_of_calls_keeps_the_count() -> None:
    blocks: BlockManager = _blocks(12)
    rng = random.Random(0)
    tokens: dict[int, int] = {}
    for step in range(3000):
        if tokens and rng.random() < 0.3:
            request_id = rng.choice(sorted(tokens))
            blocks.release(request_id)
            del tokens[request_id]
        elif tokens and rng.random() < 0.6:
            request_id = rng.choice(sorted(tokens))
            wanted = tokens[request_id] + rng.randrange(40)
            extra = -(-wanted // 16) - len(blocks.table(request_id))
            fits = extra <= blocks.num_free_blocks
            assert blocks.grow(request_id, wanted) == fits
            if fits:
                tokens[request_id] = wanted
        else:
            blocks.begin(step, [])
            tokens[step] = 0
        held = [block for request_id in tokens for block in blocks.table(request_id)]
        assert len(set(held)) == len(held)
        assert len(held) + blocks.num_free_blocks == 12
