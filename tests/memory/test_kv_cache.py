from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from config import Config
from engine.types import KVGeometry, WindowPages
from memory.kv_cache import KVCache
from memory.sizing import Usage, fit_blocks, kv_blocks
from utils.errors import OutOfMemoryError

CPU = torch.device("cpu")
GEOMETRY = KVGeometry(
    num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, num_blocks=5, dtype_bytes=4
)


def _config(**options: Any) -> Config:
    return Config(model="x", **{"max_model_len": 100, "max_num_seqs": 4, **options})


def _blocks(**options: Any) -> KVGeometry:
    (sized,) = kv_blocks(_config(**options), (GEOMETRY,))
    return sized


def test_the_views_of_a_layer_are_the_same_storage() -> None:
    layers = KVCache(GEOMETRY, torch.float32, CPU).layers()
    assert len(layers) == 3
    layer = layers[1]
    assert layer.k.shape == layer.v.shape == (5, 16, 2, 8)
    assert layer.flat.shape == (80, 4, 8)
    layer.flat[3 * 16 + 7] = torch.arange(32.0).view(4, 8)
    torch.testing.assert_close(layer.k[3, 7], torch.arange(16.0).view(2, 8))
    torch.testing.assert_close(layer.v[3, 7], torch.arange(16.0, 32.0).view(2, 8))
    for other in (layers[0], layers[2]):
        assert not other.flat.any()
    assert layer.flat.count_nonzero() == 31


def test_pages_start_as_zeros_of_the_wanted_type() -> None:
    cache = KVCache(GEOMETRY, torch.bfloat16, CPU)
    assert cache.data.dtype == torch.bfloat16
    assert not cache.data.any()


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    cache = KVCache(GEOMETRY, torch.float32, CPU)
    assert cache.data.shape == (3, 5, 16, 2, 2, 8)
    assert not cache.data.any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_the_memory_goes_with_the_cache() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    cache = KVCache(replace(GEOMETRY, num_blocks=20_000), torch.float32, CPU)
    size = cache.data.nbytes
    before = resident()
    cache.data.fill_(1.0)
    assert resident() - before > 0.9 * size
    del cache
    assert resident() - before < 0.1 * size


def test_all_layers_of_a_block_are_copied() -> None:
    cache = KVCache(GEOMETRY, torch.float32, CPU)
    cache.data.normal_()
    before = cache.data.clone()
    cache.copy_block(1, 3)
    assert torch.equal(cache.data[:, 3], before[:, 1])
    others = [block for block in range(GEOMETRY.num_blocks) if block != 3]
    assert torch.equal(cache.data[:, others], before[:, others])


def test_a_block_takes_the_bytes_that_are_announced() -> None:
    cache = KVCache(GEOMETRY, torch.float32, CPU)
    assert cache.data.nbytes == GEOMETRY.num_blocks * GEOMETRY.bytes_per_block


def test_a_cache_that_does_not_fit_says_how_much_it_needs() -> None:
    geometry = KVGeometry(3, 2, 8, 16, 2**40, 4)
    with pytest.raises(OutOfMemoryError, match=f"{2**40} blocks.*GiB.*num_kvcache_blocks"):
        KVCache(geometry, torch.float32, CPU)


def test_the_number_of_blocks_is_the_one_asked_for() -> None:
    assert _blocks(num_kvcache_blocks=77).num_blocks == 77


@pytest.mark.parametrize(("spare", "count"), [(-1, 2), (0, 3), (1, 3)])
def test_a_byte_budget_is_used_and_not_exceeded(spare: int, count: int) -> None:
    budget = 3 * GEOMETRY.bytes_per_block + spare
    assert _blocks(kvcache_memory_bytes=budget).num_blocks == count


def test_a_byte_budget_below_one_block_is_refused_with_its_size() -> None:
    budget = GEOMETRY.bytes_per_block - 1
    with pytest.raises(OutOfMemoryError, match=f"takes {GEOMETRY.bytes_per_block}"):
        _blocks(kvcache_memory_bytes=budget)


def test_without_a_size_every_request_has_room_for_its_context() -> None:
    # 100 tokens are 7 blocks, for each of 4 requests.
    assert _blocks().num_blocks == 28


def test_without_a_size_a_gibibyte_is_the_limit() -> None:
    geometry = _blocks(max_model_len=10**6, max_num_seqs=512)
    taken = geometry.num_blocks * geometry.bytes_per_block
    assert 2**30 - geometry.bytes_per_block < taken <= 2**30


class TestFitBlocks:
    """On CUDA the cache takes what weights and activations leave."""

    GIB = 2**30

    def test_the_whole_stays_below_the_utilization(self) -> None:
        usage = Usage(80 * self.GIB, 79 * self.GIB, 10 * self.GIB, 5 * self.GIB)
        (fitted,) = fit_blocks(_config(gpu_memory_utilization=0.5), (GEOMETRY,), usage)
        taken = usage.weights + usage.peak + fitted.num_blocks * GEOMETRY.bytes_per_block
        assert 0.5 * usage.total - self.GIB < taken <= 0.5 * usage.total

    def test_what_others_hold_is_neither_used_nor_charged(self) -> None:
        usage = Usage(80 * self.GIB, 20 * self.GIB, 10 * self.GIB, 5 * self.GIB)
        (fitted,) = fit_blocks(_config(gpu_memory_utilization=0.9), (GEOMETRY,), usage)
        taken = usage.weights + usage.peak + fitted.num_blocks * GEOMETRY.bytes_per_block
        assert 19 * self.GIB < taken <= 20 * self.GIB

    def test_no_room_is_an_error_with_the_numbers(self) -> None:
        usage = Usage(80 * self.GIB, 79 * self.GIB, 70 * self.GIB, 5 * self.GIB)
        with pytest.raises(OutOfMemoryError, match=r"weights take 70\.00.*gpu_memory_utilization"):
            fit_blocks(_config(gpu_memory_utilization=0.9), (GEOMETRY,), usage)


class TestGroups:
    """Groups share the memory in the ratio of what all requests together may hold."""

    FULL = replace(GEOMETRY, num_layers=1)
    WINDOW = replace(GEOMETRY, num_layers=5, kind=WindowPages(64))
    # 4 requests of 1,600 tokens are 400 blocks. A window of 64 tokens, 15 that wait for `commit`
    # and the newest token take 6 blocks, and a step of 128 tokens takes 8.
    CONFIG: ClassVar[dict[str, Any]] = {"max_model_len": 1600, "max_num_batched_tokens": 128}

    def test_a_number_of_blocks_is_that_of_the_neediest_group(self) -> None:
        for num_blocks in (400, 200):
            config = _config(num_kvcache_blocks=num_blocks, **self.CONFIG)
            full, window = kv_blocks(config, (self.FULL, self.WINDOW))
            assert (full.num_blocks, window.num_blocks) == (num_blocks, num_blocks * 32 // 400)

    def test_a_number_of_blocks_is_rounded_up(self) -> None:
        """No group is left without a block, nor with fewer than its share."""
        for num_blocks, expected in ((1, 1), (12, 1), (13, 2), (399, 32)):
            config = _config(num_kvcache_blocks=num_blocks, **self.CONFIG)
            full, window = kv_blocks(config, (self.FULL, self.WINDOW))
            assert (full.num_blocks, window.num_blocks) == (num_blocks, expected)

    def test_memory_is_used_and_not_exceeded(self) -> None:
        for budget in (10**6, 3 * 10**6):
            groups = kv_blocks(
                _config(kvcache_memory_bytes=budget, **self.CONFIG), (self.FULL, self.WINDOW)
            )
            taken = sum(group.num_blocks * group.bytes_per_block for group in groups)
            assert budget - 12 * GEOMETRY.bytes_per_block < taken <= budget
            full, window = (group.num_blocks for group in groups)
            assert abs(full * 32 / 400 - window) <= 1

    def test_without_a_size_all_requests_have_room(self) -> None:
        full, window = kv_blocks(_config(**self.CONFIG), (self.FULL, self.WINDOW))
        assert (full.num_blocks, window.num_blocks) == (400, 32)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            # 16 drafts: the window, 15 positions and 17 of the step in flight take 7 blocks.
            ({"num_speculative_tokens": 16}, 4 * 7 + 8),
            # Two steps in flight: 2 * 128 tokens of chunks, and 2 positions of each decode.
            ({"pipeline_depth": 1}, 4 * 6 + 16),
        ],
        ids=str,
    )
    def test_steps_in_flight_and_drafts_need_room_in_a_window(
        self, options: dict[str, Any], expected: int
    ) -> None:
        groups = kv_blocks(_config(**self.CONFIG, **options), (self.FULL, self.WINDOW))
        assert [group.num_blocks for group in groups] == [400, expected]

    def test_a_group_without_a_block_is_an_error(self) -> None:
        config = _config(kvcache_memory_bytes=20_000, **self.CONFIG)
        with pytest.raises(OutOfMemoryError, match="holds no block"):
            kv_blocks(config, (self.FULL, self.WINDOW))

    def test_a_group_without_a_block_on_a_gpu_is_an_error(self) -> None:
        """The window's share of twelve blocks' memory is less than one of its own blocks."""
        margin, gib = 256 << 20, 2**30
        usage = Usage(80 * gib, margin + 20_000, weights=0, peak=0)
        with pytest.raises(OutOfMemoryError, match="no memory is left for the KV cache"):
            fit_blocks(_config(**self.CONFIG), (self.FULL, self.WINDOW), usage)
