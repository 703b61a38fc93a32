"""Sums through peer memory: processes that share a file, in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize(
    ("size", "dtype", "rounds"),
    [
        (2, "float16", 8),
        (4, "float16", 16),
        (3, "bfloat16", 16),
        # Ranks share two processors, so eight of them take long.
        (8, "float16", 4),
        pytest.param(4, "float16", 200, marks=pytest.mark.slow),
        pytest.param(8, "bfloat16", 16, marks=pytest.mark.slow),
    ],
)
def test_ranks_get_the_sum_of_all(tmp_path: Path, size: int, dtype: str, rounds: int) -> None:
    """Of random shapes, by both ways of summing, with ranks that are early or late."""
    from layers.kernels.peer import PeerExchange
    from tests.kernels.peer_ranks import ROWS, WIDTH

    memory = tmp_path / "memory"
    count = PeerExchange.num_words(size, ROWS, WIDTH)
    ranks_memory = torch.from_file(
        str(memory), shared=True, size=size * count, dtype=torch.int64
    ).view(size, count)
    for mine in ranks_memory:
        PeerExchange.empty(mine, size, ROWS)
    about = (str(memory), str(size), dtype, str(rounds))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.peer_ranks", *about],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
