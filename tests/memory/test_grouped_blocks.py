"""Several cache groups: windows that slide, and managers that do all or nothing."""

from __future__ import annotations

import pytest

from config import Config
from engine.requests import Sequence
from engine.running_batch import RunningBatch
from engine.scheduler import StaticScheduler
from engine.types import (
    NO_BLOCK,
    BlockManager,
    BlockUpdate,
    KVGeometry,
    StepPlan,
    StepResult,
    WindowPages,
)
from memory.block_manager import PagedBlockManager, PrefixCacheManager
from memory.cache_groups import (
    CachingGroups,
    CachingWindowManager,
    GroupedBlockManager,
    WindowBlockManager,
    grouped,
    held_blocks,
)
from sampling_params import SamplingParams
from utils.errors import ContractError, RequestTooLongError

CONFIG = Config(model="none")


def _window(window: int, num_blocks: int = 8, size: int = 4) -> WindowBlockManager:
    geometry = KVGeometry(1, 1, 1, size, num_blocks, 4, WindowPages(window))
    return WindowBlockManager(CONFIG, geometry)


def _paged(num_blocks: int = 8, size: int = 4) -> PagedBlockManager:
    return PagedBlockManager(CONFIG, KVGeometry(1, 1, 1, size, num_blocks, 4))


@pytest.mark.parametrize(
    ("num_computed", "num_freed"), [(4, 0), (8, 0), (9, 1), (12, 1), (13, 2), (20, 3)]
)
def test_a_block_comes_back_when_the_next_position_does_not_read_it(
    num_computed: int, num_freed: int
) -> None:
    """With a window of 6, position 9 reads 4 to 9: block 0 (positions 0 to 3) is of no more use."""
    blocks = _window(6)
    tokens = [*range(20)]
    blocks.begin(0, tokens)
    blocks.grow(0, 20)
    before = list(blocks.table(0))
    blocks.commit(0, tokens, num_computed)
    assert blocks.table(0) == [NO_BLOCK] * num_freed + before[num_freed:]
    assert blocks.num_free_blocks == 3 + num_freed
    # Whoever comes next gets them.
    blocks.begin(1, tokens)
    assert blocks.grow(1, 4 * blocks.num_free_blocks)
    blocks.release(0)
    blocks.release(1)
    assert blocks.num_free_blocks == 8


def test_a_window_that_slid_goes_on_growing() -> None:
    blocks = _window(6)
    blocks.begin(0, [0] * 12)
    blocks.grow(0, 12)
    blocks.commit(0, [0] * 13, 12)
    assert blocks.grow(0, 13)
    table = blocks.table(0)
    assert (len(table), table.count(NO_BLOCK)) == (4, 1)
    blocks.commit(0, [0] * 17, 16)
    assert blocks.table(0).count(NO_BLOCK) == 2


@pytest.mark.parametrize("scarce", [0, 1])
def test_all_groups_grow_or_none(scarce: int) -> None:
    counts = [8, 8]
    counts[scarce] = 4
    blocks = grouped((_paged(counts[0]), _window(6, counts[1])))
    assert (blocks.num_blocks, blocks.num_free_blocks) == (4, 4)
    blocks.begin(1, [0] * 4)
    assert blocks.grow(1, 4)
    assert blocks.begin(0, [0] * 9) == 0
    assert blocks.grow(0, 9)
    assert blocks.num_free_blocks == 0
    before = [list(one.table(0)) for one in blocks.groups]
    assert not blocks.grow(0, 13)
    assert [one.table(0) for one in blocks.groups] == before
    blocks.release(0)
    blocks.release(1)
    assert [one.num_free_blocks for one in blocks.groups] == counts


def test_three_groups_begin_slide_and_end_together() -> None:
    """As of a runner whose model has two sizes of windows."""
    blocks = grouped((_paged(8), _window(6, 7), _window(3, 6)))
    blocks.begin(0, [0] * 12)
    assert blocks.grow(0, 12)
    blocks.commit(0, [0] * 13, 12)
    freed = [one.table(0).count(NO_BLOCK) for one in blocks.groups]
    assert freed == [0, 1, 2]
    assert [one.num_free_blocks for one in blocks.groups] == [5, 5, 5]
    blocks.release(0)
    assert [one.num_free_blocks for one in blocks.groups] == [8, 7, 6]


def test_one_group_is_its_manager() -> None:
    blocks = _paged()
    assert grouped((blocks,)) is blocks
    assert blocks.groups == (blocks,)


def test_groups_that_cannot_be_together() -> None:
    with pytest.raises(ContractError, match="different block sizes"):
        GroupedBlockManager((_paged(), _window(6, size=8)))
    caching = PrefixCacheManager(CONFIG, KVGeometry(1, 1, 1, 4, 8, 4))
    with pytest.raises(ContractError, match="WindowBlockManager cannot cache prefixes"):
        grouped((caching, _window(6)))


def test_plans_name_the_group_and_windows_slide_by_what_is_committed() -> None:
    blocks = grouped((_paged(), _window(3)))
    batch = RunningBatch(blocks, 2, lambda: 0.0)
    seq = Sequence(0, [*range(6)], SamplingParams(), max_total_tokens=30)
    batch.admit(seq)
    batch.prefill(seq, 6)
    plan = batch.build()
    assert plan is not None
    assert plan.block_updates == (BlockUpdate(0, 0, (0, 1)), BlockUpdate(0, 0, (0, 1), group=1))
    batch.commit(plan, StepResult(0, [[9]], 0.0))
    assert blocks.groups[1].table(0) == [NO_BLOCK, 1]
    batch.decode([seq], 6)
    plan = batch.build()
    assert plan is not None
    assert plan.block_updates == (BlockUpdate(0, 2, (2,)), BlockUpdate(0, 2, (0,), group=1))
    # One position of six is kept: the window ends behind position 6, and block 1 is in it.
    batch.commit(plan, StepResult(1, [[9]], 0.0))
    assert blocks.groups[1].table(0) == [NO_BLOCK, 1, 0]
    assert batch.blocks.num_free_blocks == 5


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_a_position(window: int) -> None:
    with pytest.raises(ContractError, match=f"a window of {window} positions"):
        WindowPages(window)


def test_a_window_remembers_nothing_of_who_left() -> None:
    blocks = _window(6)
    for request_id in range(3):
        blocks.begin(request_id, [0] * 12)
        blocks.grow(request_id, 12)
        blocks.commit(request_id, [0] * 12, 12)
        blocks.release(request_id)
    kept = {name: value for name, value in vars(blocks).items() if isinstance(value, dict)}
    assert kept
    assert not any(kept.values())


@pytest.mark.parametrize("depth", [0, 1])
def test_a_long_prompt_holds_the_blocks_of_its_window_and_of_its_chunks(depth: int) -> None:
    """8 positions a step, a window of 6, blocks of 4; 100 positions would be 25 blocks."""
    config = Config(model="none", max_num_batched_tokens=8, max_num_seqs=2, pipeline_depth=depth)
    geometry = KVGeometry(1, 1, 1, 4, 30, 4, WindowPages(6))
    blocks = WindowBlockManager(config, geometry)
    batch = RunningBatch(blocks, 2, lambda: 0.0)
    seq = Sequence(0, [0] * 90, SamplingParams(), max_total_tokens=110)
    batch.admit(seq)
    most = held_blocks(geometry, 100, 3 + 8 * (depth + 1))
    assert most <= (6 + 3 + 8 * (depth + 1)) // 4 + 2
    plans: list[StepPlan] = []
    table: list[int] = []
    for step in range(40):
        if seq.request_id in batch.prefilling:
            expected = min(8, 90 - seq.num_scheduled)
            assert batch.prefill(seq, 8) == expected
        elif seq.num_scheduled < 100 and batch.reserve(seq):
            batch.decode([seq])
        if plan := batch.build():
            plans.append(plan)
            for update in plan.block_updates:
                table[update.first_index :] = update.block_ids
            # The runner knows the block of each position that the step reads or writes.
            first = geometry.kind.first_read(seq.num_committed) // 4
            known = blocks.table(0)
            assert table[first : len(known)] == known[first:]
            assert len(table) * 4 >= seq.num_scheduled
        held = [block for block in blocks.table(0) if block != NO_BLOCK]
        assert len(set(held)) == len(held) == 30 - blocks.num_free_blocks <= most
        if len(plans) > depth or seq.num_scheduled == 100:
            if not plans:
                break
            tokens = [[1]] if plans[0].sampled_slots else []
            batch.commit(plans.pop(0), StepResult(step - depth, tokens, 0.0))
    assert seq.num_committed == 100
    assert blocks.num_free_blocks == 30 - 2, "positions 95 to 99 of the window are in two blocks"


def test_a_window_with_few_blocks_shortens_chunks_and_one_with_too_few_refuses() -> None:
    """A window of 6 positions may lie in 3 blocks of 4."""
    config = Config(model="none", max_num_batched_tokens=64, max_num_seqs=1)
    for num_blocks in (2, 3):
        blocks = WindowBlockManager(config, KVGeometry(1, 1, 1, 4, num_blocks, 4, WindowPages(6)))
        batch = RunningBatch(blocks, 1, lambda: 0.0)
        seq = Sequence(0, [0] * 50, SamplingParams(), max_total_tokens=60)
        if num_blocks == 2:
            with pytest.raises(RequestTooLongError, match="it needs 3 KV blocks"):
                batch.check_fits(seq)
            continue
        batch.check_fits(seq)
        batch.admit(seq)
        sizes = []
        while seq.num_scheduled < 50:
            sizes.append(batch.prefill(seq, 64))
            assert batch.prefill(seq, 64) == 0, "nothing is left until a step is committed"
            plan = batch.build()
            assert plan is not None
            batch.commit(plan, StepResult(plan.step_id, [[1]] * len(plan.sampled_slots), 0.0))
        assert sizes[0] == 12
        assert set(sizes[1:-1]) == {4}


def test_a_batch_with_a_static_size_counts_each_group() -> None:
    """Each of the requests needs 25 blocks for all positions, and at most 4 for a window."""
    options = {"max_num_batched_tokens": 4, "max_num_seqs": 4, "scheduler": "static"}
    config = Config(model="none", **options)  # type: ignore[arg-type]
    for num_full, num_window, count in ((100, 16, 4), (75, 16, 3), (100, 8, 2)):
        full = PagedBlockManager(config, KVGeometry(1, 1, 1, 4, num_full, 4))
        window = KVGeometry(1, 1, 1, 4, num_window, 4, WindowPages(6))
        blocks = grouped((full, WindowBlockManager(config, window)))
        scheduler = StaticScheduler(config, blocks, lambda: 0.0)
        for i in range(4):
            scheduler.add(Sequence(i, [0] * 60, SamplingParams(), max_total_tokens=101))
        scheduler.schedule()
        assert scheduler.batch.num_running == count


STEPS = Config(model="none", max_num_batched_tokens=8, max_num_seqs=8)


def _caching_window(num_blocks: int = 12, window: int = 6) -> CachingWindowManager:
    """Its requests hold at most 5 blocks of 4: window, the 8 tokens of a step, and the ends."""
    geometry = KVGeometry(1, 1, 1, 4, num_blocks, 4, WindowPages(window))
    return CachingWindowManager(STEPS, geometry)


def _caching_groups(full_blocks: int = 20, window_blocks: int = 12) -> CachingGroups:
    full = PrefixCacheManager(STEPS, KVGeometry(1, 1, 1, 4, full_blocks, 4))
    blocks = grouped((full, _caching_window(window_blocks)))
    assert isinstance(blocks, CachingGroups)
    return blocks


def _serve(blocks: BlockManager, tokens: list[int], request_id: int = 0, salt: str = "") -> int:
    """Compute a prompt in chunks of 8 and end; return how many tokens were in the cache."""
    cached = blocks.begin(request_id, tokens, salt)
    assert blocks.grow(request_id, len(tokens))
    for end in range(cached + 8, len(tokens) + 8, 8):
        blocks.commit(request_id, tokens, min(end, len(tokens)))
    blocks.release(request_id)
    return cached


def test_a_hit_needs_the_blocks_of_the_window_only() -> None:
    blocks = _caching_window()
    tokens = [*range(19)]
    assert _serve(blocks, tokens) == 0
    assert blocks.stats.cached_blocks == 4
    # The blocks that left the window first were idle first: two of them are evicted.
    for request_id in (1, 4):
        blocks.begin(request_id, [])
        assert blocks.grow(request_id, 20)
    assert blocks.stats.evicted_blocks == 2
    assert blocks.begin(2, tokens) == 16
    first, second, *rest = blocks.table(2)
    assert (first, second) == (NO_BLOCK, NO_BLOCK)
    assert len(set(rest)) == 2
    assert NO_BLOCK not in rest
    blocks.release(2)
    # 12 tokens need positions 7 to 11, so blocks 1 and 2, and block 1 is gone.
    assert blocks.begin(3, tokens[:13]) == 0
    for request_id in (3, 1, 4):
        blocks.release(request_id)
    assert blocks.num_free_blocks == 12


def test_hits_are_counted_and_shared() -> None:
    blocks = _caching_window()
    tokens = [*range(17)]
    _serve(blocks, tokens)
    assert blocks.begin(1, tokens) == blocks.begin(2, tokens) == 16
    assert blocks.table(1) == blocks.table(2)
    assert blocks.num_free_blocks == 10
    assert blocks.grow(1, 17)
    assert blocks.grow(2, 17)
    assert blocks.stats.hit_tokens == 32
    assert blocks.table(1)[-1] != blocks.table(2)[-1]
    # Position 22 does not attend to block 3: the first request gives its share of it up.
    blocks.commit(1, [*range(23)], 17)
    assert blocks.grow(1, 23)
    blocks.commit(1, [*range(23)], 22)
    assert blocks.table(1)[:4] == [NO_BLOCK] * 4
    assert blocks.table(2)[3] != NO_BLOCK
    assert blocks.begin(3, tokens) == 16
    for request_id in (1, 2, 3):
        blocks.release(request_id)
    assert blocks.num_free_blocks == 12


def test_a_prefix_is_not_that_of_other_tokens_or_salts() -> None:
    blocks = _caching_window()
    tokens = [*range(19)]
    _serve(blocks, tokens, salt="a")
    assert _serve(blocks, tokens, salt="b") == 0
    assert _serve(blocks, [99, *tokens[1:]], salt="a") == 0
    assert _serve(blocks, tokens, salt="a") == 16
    blocks.reset_prefix_cache()
    assert _serve(blocks, tokens, salt="a") == 0


def test_equal_blocks_of_two_requests_are_cached_once() -> None:
    blocks = _caching_window()
    tokens = [*range(9)]
    for request_id in (0, 1):
        blocks.begin(request_id, tokens)
        assert blocks.grow(request_id, 9)
    for request_id in (0, 1):
        blocks.commit(request_id, tokens, 9)
    assert blocks.stats.cached_blocks == 2
    blocks.release(0)
    blocks.release(1)
    assert blocks.num_free_blocks == 12
    assert blocks.begin(2, tokens) == 8


def test_a_request_that_takes_its_own_blocks_again_shares_none() -> None:
    blocks = _caching_window()
    tokens = [*range(60)]
    blocks.begin(0, tokens)
    assert blocks.grow(0, 60)
    assert len(blocks.table(0)) == 5
    for end in (8, 16, 24):
        blocks.commit(0, tokens, end)
        assert blocks.stats.cached_blocks == 0
    for end in (32, 40, 48, 56, 60):
        blocks.commit(0, tokens, end)
    assert blocks.stats.cached_blocks > 0
    blocks.release(0)
    assert blocks.num_free_blocks == 12
    # All of the rest has a place at once, so the blocks found may be shared.
    assert blocks.begin(1, tokens) == 56
    blocks.release(1)
    # Here it has not.
    assert blocks.begin(2, [*tokens[:56], *range(100, 140)]) == 0


def test_a_small_cache_shares_nothing() -> None:
    blocks = _caching_window(num_blocks=4)
    for _ in range(2):
        assert _serve(blocks, [*range(19)]) == 0
    assert blocks.stats.cached_blocks == 0


def test_groups_agree_on_the_longest_prefix_that_all_have() -> None:
    blocks = _caching_groups()
    tokens = [*range(30)]
    assert _serve(blocks, tokens) == 0
    assert _serve(blocks, tokens) == 28
    full, window = blocks.groups
    assert (full.stats.hit_tokens, blocks.stats.hit_tokens) == (28, 28)
    assert blocks.stats.cached_blocks == full.stats.cached_blocks + window.stats.cached_blocks
    # No prefix is found if one group has forgotten it.
    window.reset_prefix_cache()
    assert _serve(blocks, tokens) == 0
    full.reset_prefix_cache()
    assert _serve(blocks, tokens) == 0
    assert _serve(blocks, tokens) == 28
    blocks.reset_prefix_cache()
    assert _serve(blocks, tokens) == 0
    # A prompt of whole blocks keeps one of them to compute, and nothing is copied.
    assert _serve(blocks, tokens[:28]) == 24
    assert blocks.take_copies() == ()


def test_groups_shorten_a_hit_until_all_have_it() -> None:
    """The window lacks block 3, so 4 blocks of full attention are cut to 3."""
    blocks = _caching_groups()
    tokens = [*range(19)]
    _serve(blocks, tokens)
    _, window = blocks.groups
    [last] = [node for node in window._cached.values() if node.depth == 3]
    window.unlink(last)
    window._forget(last)
    assert blocks.begin(1, tokens) == 12
    full_table, window_table = (one.table(1) for one in blocks.groups)
    assert (len(full_table), NO_BLOCK in full_table) == (3, False)
    assert (len(window_table), window_table.count(NO_BLOCK)) == (3, 1)
    blocks.release(1)
    assert [one.num_free_blocks for one in blocks.groups] == [20, 12]


def test_groups_ask_each_other_again() -> None:
    """The first window has 16 or 4 tokens, the second one 12 or 4: both have 4."""
    blocks = grouped((_caching_window(), _caching_window()))
    tokens = [*range(19)]
    _serve(blocks, tokens)
    for window, depth in zip(blocks.groups, (1, 3), strict=True):
        assert isinstance(window, CachingWindowManager)
        [gone] = [node for node in window._cached.values() if node.depth == depth]
        window.unlink(gone)
        window._forget(gone)
    assert [one.cached_tokens(tokens, "", 16) for one in blocks.groups] == [16, 12]  # type: ignore[attr-defined]
    assert blocks.begin(1, tokens) == 4
    assert [len(one.table(1)) for one in blocks.groups] == [1, 1]
    blocks.release(1)
    assert [one.num_free_blocks for one in blocks.groups] == [12, 12]


def test_groups_tell_of_a_prefix_that_is_being_computed() -> None:
    blocks = _caching_groups()
    tokens = [*range(30)]
    blocks.begin(0, tokens)
    assert blocks.grow(0, 30)
    found = blocks.pending(tokens)
    assert found is not None
    assert (found.request_id, found.num_tokens) == (0, 28)
    assert blocks.pending([99] * 30) is None
    # A request that may use fewer tokens of a prefix does not wait for the others. `tokens` was
    # asked for before, without a limit.
    for same in ([*tokens], tokens):
        found = blocks.pending(same, "", 9)
        assert found is not None
        assert (found.request_id, found.num_tokens) == (0, 8)
        assert blocks.pending(same, "", 3) is None
