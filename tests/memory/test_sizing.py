"""What happens when memory runs out, without a device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from config import Config
from engine.types import KVGeometry
from llm import LLM
from memory.sizing import Usage, fit_blocks, measure_usage, memory_errors
from utils.errors import OutOfMemoryError

CPU = torch.device("cpu")
GIB = 1 << 30
# What has to stay free for the driver's part of captured graphs, and for rounding.
MARGIN = 256 << 20
# 1 MiB a block, so that nothing is lost to the size of a block but less than that.
GEOMETRY = KVGeometry(8, 8, 128, 16, num_blocks=1, dtype_bytes=4)


def test_what_torch_raises_when_memory_runs_out_names_the_ways_out() -> None:
    with pytest.raises(OutOfMemoryError, match="Lower max_num_batched_tokens"), memory_errors(CPU):
        torch.empty(2**60)
    with pytest.raises(OutOfMemoryError), memory_errors(CPU):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="size"), memory_errors(CPU):
        torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="illegal"), memory_errors(CPU):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    ours = OutOfMemoryError("one of ours")
    with pytest.raises(OutOfMemoryError, match="one of ours"), memory_errors(CPU):
        raise ours


def test_weights_that_do_not_fit(shipped: Path, tmp_path: Path) -> None:
    shutil.copytree(shipped, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 2**31}))
    with pytest.raises(OutOfMemoryError):
        LLM(tmp_path, device="cpu")


def test_tables_that_do_not_fit(shipped: Path) -> None:
    sizes = {"max_num_seqs": 10**12, "max_num_batched_tokens": 10**12, "num_kvcache_blocks": 8}
    with pytest.raises(OutOfMemoryError, match="max_num_seqs"):
        LLM(shipped, device="cpu", **sizes)


@pytest.mark.parametrize(
    ("utilization", "total", "free_before"),
    [(0.9, 80 * GIB, 79 * GIB), (0.9, 80 * GIB, 31 * GIB), (0.5, 24 * GIB, 20 * GIB + 12_345)],
)
def test_blocks_leave_room_for_weights_steps_and_a_margin(
    utilization: float, total: int, free_before: int
) -> None:
    size = GEOMETRY.bytes_per_block
    assert size == 1 << 20
    usage = Usage(total, free_before, weights=3 * GIB + 77, peak=2 * GIB + 5)
    allowed = min(utilization * total, free_before)
    config = Config(model="none", max_model_len=4096, gpu_memory_utilization=utilization)
    (fitted,) = fit_blocks(config, (GEOMETRY,), usage)
    blocks = fitted.num_blocks * size
    left = allowed - usage.weights - usage.peak - blocks
    assert MARGIN <= left < MARGIN + size


class _Allocator:
    """Stands in for torch's caching allocator on a device of 80 GiB, of which others have one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live = self.cached = self.peak = 0
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.peak)
        info = lambda device: (79 * GIB - self.reserved, 80 * GIB)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "mem_get_info", info)

    @property
    def reserved(self) -> int:
        return self.live + self.cached

    def take(self, num_bytes: int, *, keep: int = 0) -> None:
        """Allocate as much and free all but what is kept; what is cached serves first."""
        self.cached = max(self.cached, num_bytes)
        self.peak = max(self.peak, self.reserved)
        self.live += keep
        self.cached -= keep

    def synchronize(self, device: torch.device) -> None: ...

    def empty_cache(self) -> None:
        self.cached = 0

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.reserved


def test_each_step_counts_with_all_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager steps and the graphs have pools of their own, so a smaller step adds to a larger one.

    What is cached when a step begins is of no use to it later.
    """
    device = torch.device("cuda")
    allocator = _Allocator(monkeypatch)
    allocator.take(12 * GIB, keep=10 * GIB)
    steps: list[Callable[[], object]] = [
        lambda: allocator.take(3 * GIB),
        lambda: allocator.take(GIB),
    ]
    for order in (steps, steps[::-1], [*steps, steps[0]]):
        usage = measure_usage(device, 79 * GIB, order)
        peak = 4 * GIB if len(order) == 2 else 7 * GIB
        assert usage == Usage(80 * GIB, 79 * GIB, weights=10 * GIB, peak=peak)
