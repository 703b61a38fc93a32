"""The page on testing does what it says, from outside the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_parts_on_the_page_pass_their_suites(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "testing-your-part.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 2
    # A few traces: whether the suites find faults is tested elsewhere.
    fewer = "SchedulerContract.num_traces = BlockManagerContract.num_traces = 20"
    (tmp_path / "test_mine.py").write_text("\n".join([*snippets, fewer]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b1\d passed, 5 skipped", done.stdout), done.stdout
