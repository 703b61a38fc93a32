"""Which block goes first; no torch."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from config import Config
from engine.parts import PART_KINDS
from engine.types import KVGeometry
from memory.block_manager import PrefixCacheManager
from memory.eviction import (
    CachedBlock,
    CostPolicy,
    EvictionPolicy,
    LFUPolicy,
    LowestFirst,
    LRUPolicy,
)
from utils.errors import ConfigError

GEOMETRY = KVGeometry(1, 1, 1, 16, 64, 4)
POLICIES = [LRUPolicy, LFUPolicy, CostPolicy]


def _make(policy: type[EvictionPolicy], block_size: int = 16) -> EvictionPolicy:
    return policy(Config(model="none"), KVGeometry(1, 1, 1, block_size, 64, 4))


def _chain(length: int, hits: int = 0, first: int = 0) -> list[CachedBlock]:
    """The blocks of one prompt."""
    chain: list[CachedBlock] = []
    for i in range(length):
        chain.append(CachedBlock(first + i, chain[-1] if chain else "", bytes([first + i])))
        chain[-1].hits = hits
    return chain


def _release(policy: EvictionPolicy, chain: list[CachedBlock]) -> None:
    for block in reversed(chain):
        policy.add(block)


def _order(policy: EvictionPolicy) -> list[int]:
    return [policy.pop().block for _ in range(len(policy))]


def test_all_are_found_by_name() -> None:
    assert PART_KINDS["eviction_policy"].known() == {made.name: made for made in POLICIES}


@pytest.mark.parametrize("policy", POLICIES)
class TestEveryPolicy:
    def test_gives_up_children_before_parents(self, policy: type[EvictionPolicy]) -> None:
        made = _make(policy, block_size=256)
        short, long = _chain(3), _chain(40, first=10)
        _release(made, long)
        _release(made, short)
        for block in long[:20]:
            made.remove(block)
            block.hits += 1
        _release(made, long[:20])
        order = _order(made)
        for chain in (short, long):
            places = [order.index(block.block) for block in chain]
            assert places == sorted(places, reverse=True)

    def test_blocks_that_are_forgotten_are_not_kept(self, policy: type[EvictionPolicy]) -> None:
        made, seen = _make(policy), []
        for _ in range(200):
            chain = _chain(5)
            _release(made, chain)
            seen += [weakref.ref(block) for block in chain]
            for block in chain:
                made.remove(block)
        gc.collect()
        # A heap is cleared now and then.
        assert sum(ref() is not None for ref in seen) < 200

    def test_holds_what_was_added_and_not_removed(self, policy: type[EvictionPolicy]) -> None:
        made = _make(policy)
        rng = random.Random(1)
        held: set[CachedBlock] = set()
        for i in range(3000):
            if held and rng.random() < 0.3:
                block = rng.choice(sorted(held, key=lambda block: block.block))
                held.remove(block)
                made.remove(block)
            elif held and rng.random() < 0.3:
                held.remove(made.pop())
            else:
                block = CachedBlock(i, "", b"")
                block.hits = rng.randrange(5)
                made.add(block)
                held.add(block)
            assert len(made) == len(held)
        assert set(_order(made)) == {block.block for block in held}

    def test_memory_does_not_grow_with_reuse(self, policy: type[EvictionPolicy]) -> None:
        made = _make(policy)
        chain = _chain(4)
        _release(made, chain)
        for _ in range(1000):
            for block in chain:
                made.remove(block)
            _release(made, chain)
        if isinstance(made, LowestFirst):
            assert len(made.blocks.heap) <= 2 * 4 + 64
        else:
            assert len(made) == 4


def test_lru_gives_up_what_was_released_first() -> None:
    policy = _make(LRUPolicy)
    first, second = _chain(2), _chain(2, first=5)
    _release(policy, first)
    _release(policy, second)
    for block in first:
        policy.remove(block)
    _release(policy, first)
    assert _order(policy) == [6, 5, 1, 0]


def _lines(policy: EvictionPolicy, num_blocks: int) -> int:
    """Lines run to give up a block and take in another one, with so many held and as many gone."""
    made = [CachedBlock(i, "", b"") for i in range(2 * num_blocks)]
    _release(policy, made)
    for block in made[::2]:
        policy.remove(block)
    count = 0

    def trace(frame: object, event: str, arg: object) -> Callable[..., Any]:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    policy.add(policy.pop())
    sys.settrace(None)
    return count


def test_lru_takes_constant_time() -> None:
    """A queue that looks past removed entries would run a line for each."""
    policy = LRUPolicy(Config(model="none"), GEOMETRY)
    assert _lines(policy, 10_000) == _lines(_make(LRUPolicy), 10) < 10
    # A dict walks, in C, past what was removed from its front, to find its first key.
    assert type(policy.blocks) is OrderedDict


def test_lfu_gives_up_what_was_found_least() -> None:
    policy = _make(LFUPolicy)
    for hits, first in ((2, 0), (0, 5), (1, 10)):
        _release(policy, _chain(2, hits, first))
    assert _order(policy) == [6, 5, 11, 10, 1, 0]


def test_cost_keeps_what_is_dear_to_compute() -> None:
    """Of equal use and age, the end of the short prompt goes before the end of the long one."""
    policy = _make(CostPolicy, block_size=256)
    long, short = _chain(30), _chain(2, first=50)
    _release(policy, long)
    _release(policy, short)
    assert _order(policy)[:2] == [51, 50]


def test_cost_lets_go_of_what_was_dear_long_ago() -> None:
    policy = _make(CostPolicy, block_size=256)
    # Worth 4 and more each, where the others are worth 2 on top of what went before.
    _release(policy, _chain(8, hits=3, first=100))
    for i in range(60):
        _release(policy, _chain(1, hits=1, first=i))
        policy.pop()
    assert all(block.block < 100 for block in (policy.pop() for _ in range(len(policy))))


def test_a_policy_of_ones_own() -> None:
    class Newest(LRUPolicy):
        name = "newest"

        def pop(self) -> CachedBlock:
            return self.blocks.popitem()[0]

    config = Config(model="none", eviction_policy=Newest)
    blocks = PrefixCacheManager(config, KVGeometry(1, 1, 1, 16, 2, 4))
    for request_id, token in enumerate((1, 2, 3)):
        tokens = [token] * 16
        blocks.begin(request_id, tokens)
        blocks.grow(request_id, 16)
        blocks.commit(request_id, tokens, 16)
        blocks.release(request_id)
    assert blocks.begin(3, [1] * 17) == 16
    assert blocks.begin(4, [2] * 17) == 0
    assert blocks.begin(5, [3] * 17) == 16


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'lru'"):
        PrefixCacheManager(Config(model="none", eviction_policy="lrv"), GEOMETRY)
