"""Every kernel compiles for compute capability 9.0, and keeps what it computes in registers."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of stack: the kernel of logit bounds, held to 64 registers, takes 8 with Triton 3.6 and 112
# with 3.7, prefill attention 8, all others none.
MOST_STACK = 112


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_compile_without_spills() -> None:
    """In a process of its own, whose driver stands in for a GPU's."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.hopper"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines
    assert [line for line in lines if int(line[-1]) > MOST_STACK] == []
