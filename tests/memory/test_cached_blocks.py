"""Managers that reuse prefixes, all by the same tests; no torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sized

import pytest

from config import Config
from engine.types import BlockCopy, BlockManager, CacheStats, KVGeometry, PendingPrefix
from memory.block_manager import CachingBlockManager, PrefixCacheManager, RadixCacheManager
from memory.eviction import CachedBlock

SIZE = 16
Make = Callable[..., CachingBlockManager]


class _CollidingManager(PrefixCacheManager):
    """Every digest is the same, as an attacker would wish."""

    name = "colliding"

    @staticmethod
    def digest(parent: CachedBlock | str, tokens: bytes) -> bytes:
        return b"same"


@pytest.fixture(params=[PrefixCacheManager, RadixCacheManager], ids=lambda made: made.name)
def make(request: pytest.FixtureRequest) -> Make:
    def construct(num_blocks: int = 8, policy: str = "lru") -> CachingBlockManager:
        config = Config(model="none", eviction_policy=policy)
        made: CachingBlockManager = request.param(config, KVGeometry(1, 1, 1, SIZE, num_blocks, 4))
        return made

    return construct


def _tokens(*names: int) -> list[int]:
    """A block of distinct tokens for each name."""
    return [name * SIZE + i for name in names for i in range(SIZE)]


def _start(
    blocks: CachingBlockManager, request_id: int, tokens: list[int], salt: str = ""
) -> int | None:
    """Admit a request: how many tokens it found, None if there is no space."""
    found = blocks.begin(request_id, tokens, salt)
    if blocks.grow(request_id, len(tokens)):
        return found
    blocks.release(request_id)
    return None


def _serve(
    blocks: CachingBlockManager, request_id: int, tokens: list[int], salt: str = ""
) -> int | None:
    """A whole life of a request: how many tokens it found."""
    found = _start(blocks, request_id, tokens, salt)
    if found is not None:
        blocks.commit(request_id, tokens, len(tokens))
        blocks.release(request_id)
    return found


def test_what_was_committed_is_found(make: Make) -> None:
    blocks = make()
    tokens = [*_tokens(1, 2), 5]
    assert _start(blocks, 0, tokens) == 0
    table = list(blocks.table(0))
    blocks.commit(0, tokens, len(tokens))
    assert _start(blocks, 1, [*_tokens(1, 2, 3), 5]) == 2 * SIZE
    assert blocks.table(1)[:2] == table[:2]
    assert blocks.table(1)[2] != table[2]
    assert blocks.num_free_blocks == 8 - 5
    assert blocks.caches_prefixes


def test_nothing_is_found_before_it_is_committed(make: Make) -> None:
    blocks = make()
    tokens = _tokens(1, 2, 3)
    _start(blocks, 0, tokens)
    assert _start(blocks, 1, tokens) == 0
    blocks.commit(0, tokens, 2 * SIZE - 1)
    assert _serve(blocks, 2, tokens) == SIZE


def test_what_was_not_committed_is_never_found(make: Make) -> None:
    blocks = make()
    _start(blocks, 0, _tokens(1, 2))
    blocks.commit(0, _tokens(1, 2), SIZE)
    blocks.release(0)
    assert _start(blocks, 1, _tokens(1, 2, 3)) == SIZE


@pytest.mark.parametrize(
    ("extra", "found"),
    [(-1, SIZE), (0, 2 * SIZE - 1), (1, 2 * SIZE), (SIZE - 1, 2 * SIZE), (SIZE, 2 * SIZE)],
)
def test_one_token_of_a_known_prompt_is_left_to_compute(make: Make, extra: int, found: int) -> None:
    blocks = make()
    _serve(blocks, 0, _tokens(1, 2))
    assert _start(blocks, 1, _tokens(1, 2, 9)[: 2 * SIZE + extra]) == found


class TestCopies:
    """All blocks of a prompt are found; the last one is copied."""

    def test_of_the_last_block(self, make: Make) -> None:
        blocks = make()
        tokens = _tokens(1, 2)
        _start(blocks, 0, tokens)
        blocks.commit(0, tokens, len(tokens))
        first, last = blocks.table(0)
        for request_id in (1, 2):
            assert _start(blocks, request_id, tokens) == 2 * SIZE - 1
        mine, yours = blocks.table(1)[1], blocks.table(2)[1]
        assert blocks.table(1) == [first, mine]
        assert len({first, last, mine, yours}) == 4
        assert blocks.take_copies() == (BlockCopy(last, mine), BlockCopy(last, yours))
        assert blocks.take_copies() == ()
        assert blocks.stats == CacheStats(6 * SIZE, 2 * (2 * SIZE - 1), 0, 2)
        # Equal to a published one.
        blocks.commit(1, tokens, len(tokens))
        assert blocks.stats.cached_blocks == 2
        for request_id in (0, 1, 2):
            blocks.release(request_id)
        assert blocks.num_free_blocks == 8

    def test_their_sources_stay_until_they_are_planned(self, make: Make) -> None:
        blocks = make(3)
        _serve(blocks, 0, _tokens(1, 2))
        assert _start(blocks, 1, _tokens(1, 2)) == 2 * SIZE - 1
        assert blocks.num_free_blocks == 0
        assert _start(blocks, 2, _tokens(7)) is None
        ((source, target),) = ((copy.source, copy.target) for copy in blocks.take_copies())
        assert blocks.table(1)[1] == target
        assert _start(blocks, 2, _tokens(7)) == 0
        assert blocks.table(2) == [source]
        # The request that has the copy publishes it instead.
        blocks.commit(1, _tokens(1, 2), 2 * SIZE)
        blocks.release(2)
        assert _start(blocks, 3, [*_tokens(1, 2), 0]) == 2 * SIZE
        assert blocks.table(3)[1] == target

    def test_are_not_made_without_space(self, make: Make) -> None:
        blocks = make(2)
        _serve(blocks, 0, _tokens(1, 2))
        assert _start(blocks, 1, _tokens(1, 2)) == SIZE
        assert blocks.take_copies() == ()
        assert blocks.stats.hit_tokens == SIZE
        blocks.release(1)
        assert blocks.num_free_blocks == 2

    def test_are_not_made_for_who_is_gone(self, make: Make) -> None:
        blocks = make()
        _serve(blocks, 0, _tokens(1, 2))
        _start(blocks, 1, _tokens(1, 2))
        blocks.release(1)
        assert blocks.take_copies() == ()
        assert blocks.num_free_blocks == 8
        assert _start(blocks, 2, [*_tokens(1, 2), 0]) == 2 * SIZE

    def test_survive_a_reset(self, make: Make) -> None:
        blocks = make(3)
        _serve(blocks, 0, _tokens(1, 2))
        _start(blocks, 1, _tokens(1, 2))
        blocks.reset_prefix_cache()
        assert blocks.num_free_blocks == 0
        (copy,) = blocks.take_copies()
        assert copy.source not in blocks.table(1)
        assert blocks.num_free_blocks == 1
        blocks.release(1)
        assert blocks.num_free_blocks == 3


def test_generated_tokens_are_found_too(make: Make) -> None:
    blocks = make()
    prompt, output = _tokens(1)[:10], list(range(900, 930))
    tokens = list(prompt)
    _start(blocks, 0, tokens)
    for token in output:
        tokens.append(token)
        assert blocks.grow(0, len(tokens))
        if len(tokens) % SIZE == 1:
            blocks.commit(0, tokens, len(tokens) - 1)
    blocks.release(0)
    assert _start(blocks, 1, [*prompt, *output, 7]) == 2 * SIZE


def test_the_same_block_behind_other_tokens_is_not_taken(make: Make) -> None:
    blocks = make(16)
    _serve(blocks, 0, _tokens(1, 2, 3))
    assert _serve(blocks, 1, _tokens(9, 2, 3)) == 0
    assert _serve(blocks, 2, _tokens(1, 9, 3, 4)) == SIZE
    assert _serve(blocks, 3, _tokens(2, 3, 4)) == 0


def test_the_salt_separates(make: Make) -> None:
    blocks = make(16)
    tokens = _tokens(1, 2, 3)
    _serve(blocks, 0, tokens, "a")
    assert _serve(blocks, 1, tokens) == 0
    assert _serve(blocks, 2, tokens, "b") == 0
    assert _serve(blocks, 3, tokens, "a") == 3 * SIZE - 1
    assert _serve(blocks, 4, tokens) == 3 * SIZE - 1
    assert _serve(blocks, 5, tokens, "\ud800") == 0


def test_equal_blocks_computed_side_by_side_are_published_once(make: Make) -> None:
    blocks = make()
    tokens = _tokens(1, 2)
    for request_id in (0, 1):
        _start(blocks, request_id, tokens)
    for request_id in (0, 1):
        blocks.commit(request_id, tokens, len(tokens))
    assert blocks.stats.cached_blocks == 2
    first = list(blocks.table(0))
    _start(blocks, 2, [*tokens, 1])
    assert blocks.table(2)[:2] == first
    for request_id in (0, 1, 2):
        blocks.release(request_id)
    assert blocks.num_free_blocks == 8


def test_children_of_an_equal_block_outlive_it(make: Make) -> None:
    """The second request's first block is not published; then the published one is given up."""
    blocks = make(5)
    _start(blocks, 0, _tokens(1))
    long = _tokens(1, 2)
    _start(blocks, 1, long)
    blocks.commit(0, _tokens(1), SIZE)
    blocks.commit(1, long, SIZE)
    blocks.commit(1, long, 2 * SIZE)
    blocks.release(0)
    assert _serve(blocks, 2, [*_tokens(7, 8), 1]) == 0  # takes all the space there is
    assert blocks.stats.evicted_blocks == 1
    long += _tokens(3)
    assert blocks.grow(1, 3 * SIZE)
    blocks.commit(1, long, 3 * SIZE)
    table = list(blocks.table(1))
    assert _start(blocks, 3, [*long, 1]) == 3 * SIZE
    assert blocks.table(3)[:3] == table


def test_any_equal_block_that_is_given_up_is_published_anew(make: Make) -> None:
    """Of two blocks that equal published ones, the published first one goes, the second stays."""
    blocks = make(7)
    long = _tokens(1, 2)
    requests = (_tokens(1), long, list(long))
    for request_id, tokens in enumerate(requests):
        _start(blocks, request_id, tokens)
    for request_id, tokens in enumerate(requests):
        blocks.commit(request_id, tokens, len(tokens))
    blocks.release(0)
    assert _serve(blocks, 3, [*_tokens(7, 8), 1]) == 0  # takes all the space there is
    assert blocks.stats.evicted_blocks == 1
    long = requests[2]
    long += _tokens(3)
    assert blocks.grow(2, 3 * SIZE)
    blocks.commit(2, long, 3 * SIZE)
    blocks.release(1)
    assert _start(blocks, 4, [*long, 1]) == 3 * SIZE


def test_a_hit_holds_the_blocks(make: Make) -> None:
    blocks = make(4)
    _serve(blocks, 0, _tokens(1, 2, 3))
    assert _start(blocks, 1, [*_tokens(1, 2), 0]) == 2 * SIZE
    assert blocks.num_free_blocks == 1
    assert _start(blocks, 2, _tokens(8, 9)) is None
    assert _start(blocks, 3, _tokens(8)) == 0
    assert blocks.table(3)[0] not in blocks.table(1)


def test_a_request_that_finds_no_space_changes_nothing(make: Make) -> None:
    blocks = make(4)
    _serve(blocks, 0, _tokens(1, 2))
    _start(blocks, 1, _tokens(5))
    before = blocks.stats
    for _ in range(3):
        assert _start(blocks, 2, _tokens(1, 2, 3, 4)) is None
    assert blocks.stats == before
    assert blocks.num_free_blocks == 3
    assert blocks.pending(_tokens(1, 2, 3, 4, 5)) is None


def test_cached_blocks_are_given_up_only_for_space_and_the_oldest_first(make: Make) -> None:
    blocks = make(4)
    _serve(blocks, 0, [*_tokens(1), 0])
    _serve(blocks, 1, [*_tokens(2), 0])
    assert blocks.stats.evicted_blocks == 0
    assert _serve(blocks, 2, [*_tokens(1), 0]) == SIZE  # now 2 is the oldest
    assert _start(blocks, 3, _tokens(7, 8, 9)) == 0
    assert blocks.stats.evicted_blocks == 1
    blocks.release(3)
    assert _serve(blocks, 5, [*_tokens(1), 0]) == SIZE
    assert _serve(blocks, 6, [*_tokens(2), 0]) == 0


def test_of_one_chain_the_end_is_given_up_first(make: Make) -> None:
    blocks = make(4)
    _serve(blocks, 0, _tokens(1, 2, 3, 4))
    _serve(blocks, 1, _tokens(8))
    assert _serve(blocks, 2, _tokens(1, 2, 3, 4)) == 3 * SIZE


def test_counters(make: Make) -> None:
    blocks = make(4)
    assert blocks.stats == CacheStats()
    _serve(blocks, 0, _tokens(1, 2))
    _serve(blocks, 1, _tokens(1, 2, 3))
    assert blocks.stats == CacheStats(5 * SIZE, 2 * SIZE, 0, 3)
    _serve(blocks, 2, _tokens(7, 8))
    assert blocks.stats == CacheStats(7 * SIZE, 2 * SIZE, 1, 4)


class TestReset:
    def test_forgets_everything(self, make: Make) -> None:
        blocks = make(4)
        _serve(blocks, 0, _tokens(1, 2, 3))
        blocks.reset_prefix_cache()
        assert blocks.stats.cached_blocks == 0
        assert blocks.num_free_blocks == 4
        assert _serve(blocks, 1, _tokens(1, 2, 3)) == 0
        assert _serve(blocks, 2, _tokens(1, 2, 3)) == 3 * SIZE - 1

    @pytest.mark.parametrize("num_committed", [0, SIZE])
    def test_what_runs_is_not_published_any_more(self, make: Make, num_committed: int) -> None:
        blocks = make()
        tokens = _tokens(1, 2, 3)
        _start(blocks, 0, tokens)
        blocks.commit(0, tokens, num_committed)
        blocks.reset_prefix_cache()
        assert blocks.pending([*tokens, 0]) is None
        blocks.commit(0, tokens, 2 * SIZE)
        assert _start(blocks, 1, tokens) == 0
        assert blocks.pending([*tokens, 0]) == PendingPrefix(1, 3 * SIZE)
        blocks.release(0)
        assert blocks.pending([*tokens, 0]) == PendingPrefix(1, 3 * SIZE)
        assert blocks.num_free_blocks == 8 - 3
        blocks.release(1)
        assert blocks.num_free_blocks == 8


class TestPending:
    def test_is_as_much_as_both_share(self, make: Make) -> None:
        blocks = make(16)
        assert blocks.pending(_tokens(1, 2)) is None
        _start(blocks, 4, _tokens(1, 2, 3))
        assert blocks.pending(_tokens(1, 2, 3, 4)) == PendingPrefix(4, 3 * SIZE)
        assert blocks.pending(_tokens(1, 2, 3)) == PendingPrefix(4, 3 * SIZE)
        assert blocks.pending(_tokens(1, 2, 3)[:-1]) == PendingPrefix(4, 2 * SIZE)
        assert blocks.pending(_tokens(1, 9, 3)) == PendingPrefix(4, SIZE)
        assert blocks.pending(_tokens(1)) == PendingPrefix(4, SIZE)
        assert blocks.pending(_tokens(1)[:-1]) is None
        assert blocks.pending(_tokens(2, 3)) is None
        assert blocks.pending(_tokens(1, 2, 3), "salt") is None

    def test_comes_with_the_commits(self, make: Make) -> None:
        blocks = make(16)
        tokens = _tokens(1, 2, 3)
        _start(blocks, 4, tokens)
        blocks.commit(4, tokens, SIZE)
        assert blocks.pending([*tokens, 0]) == PendingPrefix(4, 3 * SIZE)
        assert blocks.pending(_tokens(1, 9, 9)) is None
        blocks.commit(4, tokens, 3 * SIZE)
        assert blocks.pending([*tokens, 0]) is None
        assert _start(blocks, 5, [*tokens, 0]) == 3 * SIZE

    def test_does_not_come_from_a_request_that_is_gone(self, make: Make) -> None:
        blocks = make(16)
        tokens = _tokens(1, 2, 3)
        _start(blocks, 4, tokens)
        blocks.release(4)
        assert blocks.pending(tokens) is None

    def test_behind_a_hit(self, make: Make) -> None:
        blocks = make(16)
        _serve(blocks, 0, _tokens(1))
        assert _start(blocks, 1, _tokens(1, 2)) == SIZE
        assert blocks.pending(_tokens(1, 2, 3)) == PendingPrefix(1, 2 * SIZE)


def test_a_collision_of_digests_is_a_miss() -> None:
    blocks = _CollidingManager(Config(model="none"), KVGeometry(1, 1, 1, SIZE, 8, 4))
    _serve(blocks, 0, [*_tokens(1), 0])
    assert _serve(blocks, 1, [*_tokens(2), 0]) == 0
    assert _serve(blocks, 2, [*_tokens(2), 0]) == SIZE
    assert _serve(blocks, 3, [*_tokens(1), 0]) == 0
    assert blocks.num_free_blocks == 8


def _num_entries(blocks: BlockManager) -> dict[str, int]:
    """The length of each collection that a block manager holds."""
    held = vars(blocks).items()
    return {name: len(value) for name, value in held if isinstance(value, Sized)}


@pytest.mark.parametrize("kind", ["shipped", "colliding"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "cost"])
def test_any_order_of_calls_gives_true_hits_and_keeps_the_count(
    make: Make, policy: str, kind: str
) -> None:
    """Every found block holds exactly the tokens that it stands for, whatever happened before."""
    num_blocks = 12
    blocks = make(num_blocks, policy)
    if kind == "colliding":
        config = Config(model="none", eviction_policy=policy)
        blocks = _CollidingManager(config, KVGeometry(1, 1, 1, SIZE, num_blocks, 4))
    empty = _num_entries(blocks)
    prompts: list[list[int]] = []
    rng = random.Random(f"{policy} {kind}")
    written: dict[int, list[int]] = {}  # block: all tokens up to its end
    running: dict[int, list[int]] = {}
    computed: dict[int, int] = {}
    for step in range(4000):
        choice = rng.random()
        if choice < 0.01:
            blocks.reset_prefix_cache()
            written = {
                block: content
                for request_id in running
                for block in blocks.table(request_id)
                if (content := written.get(block)) is not None
            }
        elif running and choice < 0.3:
            request_id = rng.choice(sorted(running))
            blocks.release(request_id)
            del running[request_id], computed[request_id]
        elif running and choice < 0.7:
            request_id = rng.choice(sorted(running))
            tokens = running[request_id]
            if computed[request_id] == len(tokens):
                tokens += _tokens(rng.randrange(3))[: rng.randrange(1, SIZE)]
                if not blocks.grow(request_id, len(tokens)):
                    blocks.release(request_id)
                    del running[request_id], computed[request_id]
                    continue
            end = rng.randint(computed[request_id] + 1, len(tokens))
            for i in range(computed[request_id] // SIZE, end // SIZE):
                written[blocks.table(request_id)[i]] = tokens[: (i + 1) * SIZE]
            computed[request_id] = end
            blocks.commit(request_id, tokens, end)
        else:
            tokens = _tokens(*(rng.randrange(3) for _ in range(rng.randrange(1, 6))))
            tokens = tokens[: len(tokens) - rng.randrange(SIZE)]
            found = _start(blocks, step, tokens)
            if found is None:
                continue
            assert found % SIZE == 0 or found == len(tokens) - 1
            assert found < len(tokens)
            for copy in blocks.take_copies():
                written[copy.target] = written[copy.source]
            running[step], computed[step] = tokens, found
            prompts.append(list(tokens))
            for i, block in enumerate(blocks.table(step)):
                if i * SIZE < found:
                    assert written[block] == tokens[: (i + 1) * SIZE]
                else:
                    written.pop(block, None)
        held = {block for request_id in running for block in blocks.table(request_id)}
        assert len(held) + blocks.num_free_blocks == num_blocks
    assert blocks.stats.hit_tokens > (0 if kind == "colliding" else 5000)
    for request_id in running:
        blocks.release(request_id)
    for tokens in prompts:
        assert blocks.pending(tokens) is None
    blocks.reset_prefix_cache()
    assert _num_entries(blocks) == empty
