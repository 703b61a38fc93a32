"""bench.py from the command line: what cannot run is told first, and costs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import bench
from benchmarks import command, compare, run
from benchmarks.engines import Setting, Tokens
from benchmarks.processes import Ran
from benchmarks.reference import Agreement
from benchmarks.workloads import Workload, check_workload, works_of
from tests.checkpoints import MAX_POSITION, Checkpoints


class _Process:
    """An engine that answers at once, and refuses what ours would refuse."""

    startup_seconds = construct_seconds = 0.0

    def __init__(self, name: str, setting: Setting) -> None:
        self._longest = setting.max_model_len

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, work: Workload) -> Ran:
        assert work.longest <= self._longest
        return Ran(1.0, [[1] * n for n in work.lengths], 1 << 20)


class _Reference:
    def __init__(self, setting: Setting) -> None:
        pass

    def judge(self, work: Workload, outputs: Tokens) -> Agreement:
        return Agreement(1, 1)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, checkpoints: Checkpoints) -> Any:
    """Calls bench.py with a small model and engines without a process."""
    monkeypatch.setattr(compare, "EngineProcess", _Process)
    monkeypatch.setattr(run, "Reference", _Reference)
    model = str(checkpoints["qwen3-gqa6"])

    def main(*arguments: str, model: str | None = model) -> None:
        own = ("--model", model) if model else ()
        monkeypatch.setattr("sys.argv", ["bench.py", *arguments, *own])
        bench.main()

    return main


def test_workloads_beyond_the_context_are_named_and_left_out(
    call: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    call("--engine", "ours", "--workload", "ttft", "seeds", "flood", "--repeats", "1")
    out = capsys.readouterr().out
    for name, tokens in (("first token of 3800", "3,801"), ("seeds, 256 requests", "2,0")):
        (line,) = [line for line in out.splitlines() if line.startswith(f"{name}: left out")]
        assert tokens in line
        assert f"holds {MAX_POSITION:,}" in line
        assert out.index(line) < out.index("device CPU")
    rows = re.findall(r"^(.{22})ours .* (ms|tok/s) \(", out, re.M)
    assert [(name.strip(), unit) for name, unit in rows] == [
        ("first token of 128", "ms"),
        ("1,024 of 16 to 64", "tok/s"),
    ]
    with pytest.raises(SystemExit, match="none of the workloads fits"):
        call("--workload", "seeds")


def test_the_shipped_model_holds_the_default_workloads(shipped: Path) -> None:
    limit = json.loads((shipped / "config.json").read_text())["max_position_embeddings"]
    for names in (["seeds", "latency"], ["compare"], ["small"]):
        assert all(work.longest <= limit for work in works_of(names, 1000))


def test_the_check_fits_the_context() -> None:
    assert check_workload(1000, 4096).longest > 512
    assert check_workload(1000, 512).longest <= 512


def test_a_workload_behind_two_names_runs_once() -> None:
    one, *others = works_of(["latency", "compare"], 1000)
    assert one.name not in {work.name for work in others}
    assert one.checked
    assert len(others) == 3


def test_an_unusable_model_is_a_message(call: Any) -> None:
    with pytest.raises(SystemExit, match="model='/nope': there is no such folder"):
        call(model="/nope")


def test_a_part_that_fails_costs_no_other_its_figures(
    call: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure_scheduling(num_steps: int) -> Any:
        raise RuntimeError("a planned failure")

    monkeypatch.setattr(command, "measure_scheduling", measure_scheduling)
    monkeypatch.setattr("benchmarks.startup._READY", "import sys; sys.exit('no device')")
    file = tmp_path / "out.json"
    names = ("scheduler", "small", "startup")
    with pytest.raises(SystemExit) as error:
        call("--workload", *names, "--repeats", "1", "--json", str(file), model=None)
    assert str(error.value).splitlines() == [
        "scheduler: RuntimeError: a planned failure",
        "startup: its process ended with exit code 1",
    ]
    out, err = capsys.readouterr()
    assert "tok/s" in out
    assert "no device" in err
    assert len(json.loads(file.read_text())["rows"]) == 2
