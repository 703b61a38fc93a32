"""Sums through peer memory: processes that share a file, in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize(("size", "dtype"), [(2, "float16"), (4, "float16"), (3, "bfloat16")])
def test_ranks_get_the_sum_of_all(tmp_path: Path, size: int, dtype: str) -> None:
    """Of random shapes, by both ways of summing, with ranks that are early or late."""
    # Whatever is left in the memory must not pass for an answer; only zeros mean "never written".
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(1 << 20))
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
        outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(output.endswith("exchanged\n") for output in outputs), "\n".join(outputs)
