"""Construction of this engine in new processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.processes import EngineFailedError

_READY = (
    "import json, sys, time; from llm import LLM; start = time.perf_counter(); "
    "LLM(sys.argv[1], **json.loads(sys.argv[2])); print('READY', time.perf_counter() - start)"
)


def startup_seconds(model: Path, repeats: int, **options: Any) -> list[float]:
    """Construction to ready, once with a cold kernel cache and then with the same one, warm.

    Args:
        options: of the LLM; numbers and names.

    Raises:
        EngineFailedError: it does not get ready.
    """
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(1 + repeats):
            out = subprocess.run(
                [sys.executable, "-c", _READY, str(model.resolve()), json.dumps(options)],
                cwd=Path(__file__).parents[1],
                env={**os.environ, "TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=False,
            )
            if out.returncode:
                sys.stderr.write(out.stderr)
                raise EngineFailedError(f"its process ended with exit code {out.returncode}")
            seconds.append(float(out.stdout.split("READY")[1]))
    return seconds
