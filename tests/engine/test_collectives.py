"""How ranks on CUDA devices meet, without any; the rest is in tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.ranks.collectives import nccl_context
from engine.ranks.worker import Failure
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
