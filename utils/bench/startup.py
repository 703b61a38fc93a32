"""Construction of this engine in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_READY = (
    "import sys, time; from llm import LLM; start = time.perf_counter(); "
    "LLM(sys.argv[1]); print('READY', time.perf_counter() - start)"
)


def startup_seconds(model: Path, repeats: int) -> list[float]:
    """Construction to ready, once with a cold kernel cache and then with the same one, warm."""
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(1 + repeats):
            out = subprocess.run(
                [sys.executable, "-c", _READY, str(model.resolve())],
                cwd=Path(__file__).parents[2],
                env={**os.environ, "TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=True,
            )
            seconds.append(float(out.stdout.split("READY")[1]))
    return seconds
