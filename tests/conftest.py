"""Fixtures; torch and transformers are imported only by the tests that use them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before torch is imported: the models are far too small for threads to help.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from tests.checkpoints import Checkpoints

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Small random checkpoints by the name of their variant."""
    from tests.checkpoints import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The trained model that comes with the engine."""
    return ROOT / "assets" / "qwen3-tiny-python"
