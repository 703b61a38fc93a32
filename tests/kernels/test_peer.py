"""Sums through peer memory: processes that share a file, in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize(("size", "dtype"), [(2, "float16"), (4, "float16"), (3, "bfloat16")])
def test_ranks_get_the_sum_of_all(tmp_path: Path, size: int, dtype: str) -> None:
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
    command = [sys.executable, "-m", "tests.kernels.peer_ranks", str(memory)]
    options = {
        "env": {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        "cwd": Path(__file__).parents[2],
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    ranks = [
        subprocess.Popen([*command, str(rank), str(size), dtype], **options)  # type: ignore[call-overload]
        for rank in range(size)
    ]
    try:
        # One that fails leaves the others waiting.
        deadline = time.monotonic() + 180
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
    outputs = [rank.communicate()[0] for rank in ranks]
    assert all(output.endswith("exchanged\n") for output in outputs), "\n".join(outputs)
