"""How ranks on CUDA devices meet, without any; the rest is in tests/gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from config import Config
from engine.ranks.collectives import check_divides, join_ranks, nccl_context
from engine.ranks.worker import Failure, Rank
from tests.checkpoints import Checkpoints
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
