"""How ranks on CUDA devices meet, without any; the rest is in tests/gpu."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from config import Config
from engine.ranks import collectives
from engine.ranks.collectives import (
    GroupContext,
    check_divides,
    gloo_context,
    join_ranks,
    nccl_context,
)
from engine.ranks.worker import Failure, Rank
from layers.parallel import ordered_sum
from tests.checkpoints import Checkpoints
from tests.rank_parts import random_parts, same_bits
from utils.checkpoint import open_checkpoint
from utils.errors import ConfigError


def test_devices_that_nccl_does_not_connect_are_an_error_unless_a_rank_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise torch.distributed.DistBackendError("P2P is disabled between GPUs 1 and 0")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2: .*P2P is disabled") as caught:
        nccl_context(1, 2, None)
    report = Failure.of(caught.value)
    assert isinstance(report.error, ConfigError)
    # What the parent waits for the other ranks' reports by.
    assert report.lost_peer


def test_every_rank_has_a_device_of_its_own(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(checkpoints["qwen2-square"]))
    config = Config(model="x", device="cuda", tensor_parallel_size=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_divides(config, checkpoint)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2: there are 1 CUDA devices"):
        check_divides(config, checkpoint)


def test_a_rank_takes_no_more_threads_than_it_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With all threads of the machine in every rank, ranks would wait for each other's."""
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    rank = Rank(0, 1, str(tmp_path / "store"), num_threads=3)
    context = join_ranks(Config(model="x", device="cpu"), rank, 96)
    assert (context.rank, context.size, taken) == (0, 1, [3])


def _on_ranks(size: int, run: Callable[[GroupContext], list[Tensor]]) -> list[list[Tensor]]:
    """What `run` returns on each rank. The ranks are threads, connected by gloo."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: run(gloo_context(rank, size, store)), range(size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_rows_sum_has_the_same_bits_among_any_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype
) -> None:
    """Gathered, or added up by shares, of which the last one may be padded or empty."""
    width, most = 24, 41
    row_bytes = width * dtype.itemsize * (size - 1)
    monkeypatch.setattr(collectives, "_GATHER_BYTES", 16 * row_bytes)
    parts = random_parts((size, most, width), torch.Generator().manual_seed(size)).to(dtype)
    expected = torch.zeros(most, width)
    for part in parts:
        expected += part.float()
    expected = expected.to(dtype)
    assert same_bits(ordered_sum(parts, dtype), expected)
    counts = (1, 2, 15, 16, 17, 40, most)

    def run(rank: GroupContext) -> list[Tensor]:
        mine = parts[rank.rank]
        sums = [rank.all_reduce(mine[:count].clone()) for count in counts]
        few = [rank.all_reduce(mine[i, :1].clone()) for i in range(3)]
        return [*sums, *few, rank.all_reduce(mine.t()), rank.all_reduce(mine[:0])]

    for *sums, turned, empty in _on_ranks(size, run):
        for count, got in zip(counts, sums, strict=False):
            assert same_bits(got, expected[:count])
        for i, got in enumerate(sums[len(counts) :]):
            assert same_bits(got, expected[i, :1])
        assert same_bits(turned, expected.t())
        assert empty.shape == (0, width)


def test_another_order_of_the_ranks_would_show() -> None:
    """The first part and the last one cancel, so it matters whether others are added between."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        parts = random_parts((4, 41, 24), torch.Generator().manual_seed(1)).to(dtype)
        assert not same_bits(ordered_sum(parts, dtype), ordered_sum(parts.roll(1, 0), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_gathered_values_are_unchanged(dtype: torch.dtype) -> None:
    values = torch.tensor([[-0.0, 1.5], [float("inf"), 2.0], [-7.0, 1e-30]]).nan_to_num(0, 9, -9)
    if dtype != torch.int64:
        values[0, 1], values[1, 0] = float("nan"), float("inf")
    x = values.to(dtype)

    def run(rank: GroupContext) -> list[Tensor]:
        return [rank.all_gather(x[rank.rank :: 3] if rank.rank else x[:1])]

    for (got,) in _on_ranks(3, run):
        assert torch.equal(got.view(torch.uint8), x.view(3, 1, 2).view(torch.uint8))
