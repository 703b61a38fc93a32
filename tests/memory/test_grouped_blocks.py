"""Several cache groups: windows that slide, and managers that do all or nothing."""

from __future__ import annotations

import pytest

from config import Config
from engine.requests import Sequence
from engine.running_batch import RunningBatch
from engine.scheduler import StaticScheduler
from engine.types import NO_BLOCK, BlockUpdate, KVGeometry, StepPlan, StepResult, WindowPages
from memory.block_manager import PagedBlockManager, PrefixCacheManager
from memory.cache_groups import GroupedBlockManager, WindowBlockManager, grouped, held_blocks
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


def test_one_group_is_its_manager() -> None:
    blocks = _paged()
    assert grouped((blocks,)) is blocks
    assert blocks.groups == (blocks,)


def test_groups_that_cannot_be_together() -> None:
    with pytest.raises(ContractError, match="different block sizes"):
        GroupedBlockManager((_paged(), _window(6, size=8)))
    caching = PrefixCacheManager(CONFIG, KVGeometry(1, 1, 1, 4, 8, 4))
    with pytest.raises(ContractError, match="caches prefixes"):
        GroupedBlockManager((caching, _window(6)))


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
