"""Several cache groups: windows that slide, and managers that do all or nothing."""

from __future__ import annotations

import pytest

from config import Config
from engine.requests import Sequence
from engine.running_batch import RunningBatch
from engine.types import NO_BLOCK, BlockUpdate, KVGeometry, StepResult, WindowPages
from memory.block_manager import PagedBlockManager, PrefixCacheManager
from memory.cache_groups import GroupedBlockManager, WindowBlockManager, grouped
from sampling_params import SamplingParams
from utils.errors import ContractError

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
