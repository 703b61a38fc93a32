"""Requests that wait for blocks: their cached prefix is looked up once, and never out of date."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import memory.block_manager
import memory.cache_groups
import memory.prefix_records
from config import Config
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from engine.types import BlockManager, KVGeometry, PendingPrefix, StepResult, WindowPages
from memory.block_manager import CachingBlockManager, PrefixCacheManager, RadixCacheManager
from memory.cache_groups import CachingWindowManager, grouped
from sampling_params import SamplingParams

SIZE = 4
Make = Callable[[int], BlockManager]
CONFIG = Config(model="none", max_num_seqs=4, max_num_batched_tokens=400)


def _prefix(num_blocks: int) -> BlockManager:
    return PrefixCacheManager(CONFIG, KVGeometry(1, 1, 1, SIZE, num_blocks, 4))


def _radix(num_blocks: int) -> BlockManager:
    return RadixCacheManager(CONFIG, KVGeometry(1, 1, 1, SIZE, num_blocks, 4))


def _window(num_blocks: int) -> BlockManager:
    config = Config(model="none", max_num_seqs=4, max_num_batched_tokens=8)
    geometry = KVGeometry(1, 1, 1, SIZE, num_blocks, 4, WindowPages(6))
    return CachingWindowManager(config, geometry)


def _groups(num_blocks: int) -> BlockManager:
    full, window = _prefix(num_blocks), _window(num_blocks)
    return grouped((full, window))


def _ample_groups(num_blocks: int) -> BlockManager:
    """The window has blocks for a step of `CONFIG`, so that it shares them."""
    geometry = KVGeometry(1, 1, 1, SIZE, num_blocks + 200, 4, WindowPages(6))
    return grouped((_prefix(num_blocks), CachingWindowManager(CONFIG, geometry)))


MAKES: list[Make] = [_prefix, _radix, _window, _groups]


@pytest.fixture(params=MAKES, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


def _serve(blocks: BlockManager, tokens: list[int], request_id: int = 0) -> None:
    """A whole life of a request, in chunks of 8."""
    cached = blocks.begin(request_id, tokens)
    assert blocks.grow(request_id, len(tokens))
    for end in range(cached + 8, len(tokens) + 8, 8):
        blocks.commit(request_id, tokens, min(end, len(tokens)))
    blocks.release(request_id)


def _managers(blocks: BlockManager) -> list[Any]:
    return list(blocks.groups)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of what hashes or looks up a block."""
    counted: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def call(*args: Any) -> Any:
            counted[name] += 1
            return plain(*args)

        static = isinstance(vars(owner).get(name), staticmethod)
        monkeypatch.setattr(owner, name, staticmethod(call) if static else call)

    count(PrefixCacheManager, "digest")
    count(memory.block_manager, "block_tokens")
    count(memory.cache_groups, "block_tokens")
    count(PrefixCacheManager, "find_again")
    count(RadixCacheManager, "find")
    count(memory.cache_groups, "_parent_of_next")
    count(memory.prefix_records, "block_tokens")
    return counted


def _running(make: Make, num_hits: int) -> tuple[ContinuousScheduler, Sequence]:
    """A request that decodes, and one that waits with so many blocks in the cache.

    The request that decodes gets 20 blocks, which evict others. The one that waits needs 30.
    """
    blocks = make(40 + num_hits + 20)
    prompt = [*range(num_hits * SIZE)]
    _serve(blocks, [*range(500, 500 + 20 * SIZE)])
    _serve(blocks, prompt)
    scheduler = ContinuousScheduler(CONFIG, blocks, lambda: 0.0)
    for i, tokens in enumerate(([*range(1000, 1160)], [*prompt, *range(2000, 2000 + 30 * SIZE)])):
        params = SamplingParams(max_tokens=60)
        scheduler.add(Sequence(i, tokens, params, max_total_tokens=len(tokens) + 60))
    return scheduler, scheduler._waiting[1]


def _step(scheduler: ContinuousScheduler, token: int) -> None:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, StepResult(plan.step_id, [[token] for _ in plan.sampled_slots], 0.0))


@pytest.mark.parametrize("make_blocks", [_prefix, _radix, _ample_groups])
def test_a_waiting_request_is_hashed_once(make_blocks: Make, counts: Counter[str]) -> None:
    """While it waits through 36 steps, 9 blocks are published and 9 others are evicted."""
    work = []
    for num_hits in (40, 160):
        scheduler, waiting = _running(make_blocks, num_hits)
        _step(scheduler, 3)
        first = scheduler.batch.blocks.groups[0]
        evicted = first.stats.evicted_blocks
        counts.clear()
        for token in range(36):
            _step(scheduler, 50 + token)
        assert waiting.slot is None
        assert first.stats.evicted_blocks == evicted + 9
        work.append(dict(counts))
    assert work[0] == work[1]
    groups = len(scheduler.batch.blocks.groups)
    # All of it is the work of the request that decodes, but for one look-up after a publication.
    assert work[0].get("digest", 0) <= 9 * groups
    assert work[0]["block_tokens"] == 9 * groups
    assert work[0].get("find_again", 0) + work[0].get("find", 0) <= 9 * (groups + 1)


def _prompt(rng: random.Random) -> list[int]:
    """Blocks of three kinds, so that equal blocks come up behind different ones."""
    words = [rng.randrange(3) for _ in range(rng.randrange(1, 8))]
    return [word for word in words for _ in range(SIZE)] + [7] * rng.randrange(3)


def _same_for_an_equal_list(blocks: BlockManager, tokens: list[int]) -> None:
    afresh = list(tokens)
    assert blocks.fits(tokens) == blocks.fits(afresh)
    assert blocks.pending(tokens) == blocks.pending(afresh)
    if isinstance(blocks, CachingBlockManager):
        for most in (len(tokens), 12):
            found = blocks.cached_tokens(tokens, "", most)
            assert found == blocks.cached_tokens(afresh, "", most)
    blocks.abandon(afresh)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_remembered_is_what_a_new_look_finds(make: Make, seed: int) -> None:
    """And `fits` is what `begin` and `grow` come to."""
    rng, blocks = random.Random(seed), make(24)
    running: dict[int, list[int]] = {}
    waiting = [_prompt(rng) for _ in range(3)]
    outcomes: Counter[bool] = Counter()
    for step in range(1500):
        move = rng.random()
        for tokens in waiting:
            _same_for_an_equal_list(blocks, tokens)
        if move < 0.1:
            waiting[0] += _prompt(rng)[:5]
        elif move < 0.5 and running:
            request_id = rng.choice(list(running))
            tokens = running[request_id]
            blocks.commit(request_id, tokens, rng.choice((len(tokens), len(tokens) // 2)))
            if move < 0.3:
                blocks.release(request_id)
                del running[request_id]
        elif move < 0.505:
            blocks.reset_prefix_cache()
        elif len(running) < 6:
            tokens = waiting.pop(rng.randrange(3))
            fits = blocks.fits(tokens)
            blocks.begin(step, tokens)
            outcomes[fits] += 1
            assert blocks.grow(step, len(tokens)) == fits
            if fits:
                running[step] = tokens
                blocks.take_copies()
            else:
                blocks.release(step)
            waiting.append(_prompt(rng))
    assert outcomes[True] > 50
    assert outcomes[False] > 5
    assert blocks.stats.hit_tokens > 0


def test_a_block_that_was_evicted_and_published_again_is_another(make: Make) -> None:
    blocks = make(12)
    tokens = [*range(4 * SIZE)]
    _serve(blocks, tokens)
    waiting = [*tokens, 1]
    assert blocks.fits(waiting)
    _serve(blocks, [9] * 12 * SIZE)
    assert blocks.fits(waiting)
    _serve(blocks, tokens)
    cached = blocks.begin(1, waiting)
    assert cached == 4 * SIZE
    assert blocks.grow(1, len(waiting))
    blocks.release(1)


def test_salts_are_looked_up_on_their_own(make: Make) -> None:
    blocks = make(12)
    tokens = [*range(17)]
    _serve(blocks, tokens)
    assert blocks.fits(tokens, "salt")
    assert blocks.begin(1, tokens, "salt") == 0
    blocks.release(1)
    assert blocks.fits(tokens, "salt")
    assert blocks.begin(1, tokens) == 16


def test_a_shared_prefix_is_compared_once() -> None:
    """Also for the first in the queue, which is asked in each step if no more can be deferred."""

    class Tokens(list[int]):
        num_read = 0

        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, slice):
                self.num_read += index.stop - index.start
            return super().__getitem__(index)

    blocks = _prefix(60)
    leader, follower = Tokens(range(200)), Tokens([*range(160), 999, *range(100)])
    blocks.begin(0, leader)
    assert blocks.grow(0, 200)
    assert blocks.pending(follower) == PendingPrefix(0, 160)
    for end in (40, 80, 120):
        blocks.commit(0, leader, end)
        follower.num_read = 0
        assert blocks.pending(follower) == PendingPrefix(0, 160)
        # The blocks that were published since, the next one, and the one that differs.
        assert follower.num_read <= 12 * SIZE
        follower.num_read = 0
        assert blocks.pending(follower) == PendingPrefix(0, 160)
        assert follower.num_read == SIZE
    # Another request of the same id, with other tokens.
    blocks.release(0)
    other = [*range(124), *range(300, 360)]
    blocks.begin(0, other)
    assert blocks.grow(0, len(other))
    assert blocks.pending(follower) == PendingPrefix(0, 124)


class TestNothingIsLeft:
    def test_of_who_was_aborted(self, make: Make) -> None:
        blocks = make(30)
        scheduler = ContinuousScheduler(CONFIG, blocks, lambda: 0.0)
        for i in range(40):
            params = SamplingParams(max_tokens=2)
            seq = Sequence(i, [i] * 90, params, max_total_tokens=92)
            scheduler.add(seq)
            scheduler.schedule()
            blocks.fits(seq.token_ids)
        assert any(one._matches._matches for one in _managers(blocks))
        for i in range(40):
            scheduler.abort(i)
        assert not any(one._matches._matches for one in _managers(blocks))

    def test_of_who_was_admitted(self, make: Make) -> None:
        blocks = make(30)
        tokens = [*range(20)]
        for _ in range(3):
            blocks.pending(tokens)
            assert blocks.fits(tokens)
            _serve(blocks, tokens)
            assert not any(one._matches._matches for one in _managers(blocks))

    def test_but_a_few_of_who_only_asked(self, make: Make) -> None:
        blocks = make(30)
        for i in range(40):
            blocks.fits([i] * 20)
        kept = [len(one._matches._matches) for one in _managers(blocks)]
        assert max(kept) == CONFIG.max_num_seqs + 1
        blocks.reset_prefix_cache()
        assert not any(one._matches._matches for one in _managers(blocks))


def test_many_publications_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a window's matches remember."""
    monkeypatch.setattr(memory.prefix_records, "_NUM_NEWS", 2)
    blocks = _window(40)
    waiting = [*range(41)]
    assert blocks.fits(waiting)
    _serve(blocks, waiting[:-1])
    assert blocks.begin(1, waiting) == 40
