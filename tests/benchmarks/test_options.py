"""The command line: nothing is dropped without a word, and mistakes are told before a run."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from benchmarks.options import ALONE, parse_args
from benchmarks.workloads import NAMES


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says whether there is a CUDA device, whatever this machine has."""

    def choose(kind: str) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: kind == "cuda")

    return choose


def _parse(line: str) -> argparse.Namespace:
    return parse_args("", line.split())


@pytest.mark.parametrize(
    ("kind", "line", "engines", "workloads"),
    [
        ("cpu", "", ["ours", "transformers"], ["compare"]),
        # The shipped model is too short for ttft.
        ("cuda", "", ["ours"], ["seeds", "latency"]),
        ("cuda", "--profile out", ["ours"], ["seeds"]),
        ("cpu", "--profile out", ["ours"], ["compare"]),
        ("cpu", "--engine sequential,ours", ["sequential", "ours"], ["small"]),
        ("cuda", "--tensor-parallel 1 2", ["1 devices", "2 devices"], ["seeds", "latency"]),
    ],
)
def test_defaults(
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    line: str,
    engines: list[str],
    workloads: list[str],
) -> None:
    machine(kind)
    monkeypatch.chdir(tmp_path)
    args = _parse(line)
    assert [one.label for one in args.engines] == engines
    assert args.workload == workloads
    assert (args.dtype, args.repeats) == ("auto", 7)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--profile", "--profile out --nvtx"),
        ("--engine", "--profile out --engine transformers"),
        ("--engine", "--profile out --engine ours,transformers"),
        ("--tensor-parallel", "--profile out --tensor-parallel 2"),
        ("--report", "--profile out --report folder"),
        ("--timeline", "--profile out --timeline steps.svg"),
        ("--repeats", "--profile out --repeats 2"),
        ("--workload", "--profile out --workload filters"),
        ("--workload", "--profile out --workload small flood"),
        ("--shape", "--model some --shape qwen3-8b"),
        ("--model", "--workload kernels --model some"),
        ("--dtype", "--workload seeds kernels --dtype float16"),
        ("--model", "--workload scheduler --model some"),
        ("--dtype", "--workload scheduler --dtype float16"),
        ("--engine", "--workload seeds filters --engine ours"),
        ("--engine", "--workload startup --engine vllm"),
        ("--engine", "--workload overlap --engine vllm"),
        ("--tensor-parallel", "--workload text --tensor-parallel 2"),
        ("--tensor-parallel", "--workload startup --tensor-parallel 2"),
        ("--tensor-parallel", "--workload overlap --tensor-parallel 2"),
        ("--tensor-parallel", "--engine ours --tensor-parallel 2"),
        ("--threads", "--workload startup --threads 2"),
        ("--engine", "--workload exact --engine ours"),
        ("--repeats", "--workload exact --repeats 2"),
        ("--requests", "--workload exact seeds --requests 2"),
        ("--tokens", "--workload seeds --tokens 2"),
        ("--requests", "--workload exact --requests 0"),
        ("--repeats", "--workload overlap --repeats 2"),
        ("--timeline", "--timeline steps.svg"),
        ("--report", "--workload startup --report folder"),
        ("--repeats", "--repeats 0"),
        ("--repeats", "--repeats -1"),
        ("--threads", "--threads 0"),
        ("--threads", "--threads -1"),
        ("--kv-bytes", "--kv-bytes 0"),
        ("--tensor-parallel", "--tensor-parallel 0"),
        ("--tensor-parallel", "--tensor-parallel 9"),
        ("--dtype", "--dtype foo"),
        ("--engine", "--engine ours,ours"),
        ("--engine", "--engine ours:fast"),
        ("--workload", "--workload small small"),
    ],
)
def test_what_would_be_dropped_or_is_wrong_is_refused(
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    line: str,
) -> None:
    machine("cuda")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        _parse(line)
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert option in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["kernels", "overlap"])
def test_some_workloads_need_a_device(
    machine: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    machine("cpu")
    with pytest.raises(SystemExit):
        _parse(f"--workload {name}")
    assert f"--workload: {name} needs a CUDA device" in capsys.readouterr().err


def test_what_the_page_says_can_be_run(
    machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine("cuda")
    monkeypatch.chdir(tmp_path)
    _parse("--shape qwen3-0.6b --workload kernels seeds latency ttft startup --repeats 3")
    _parse("--shape qwen3-8b --tensor-parallel 1 2 4 --workload seeds128 latency")
    _parse("--workload overlap --shape qwen3-0.6b --timeline docs/overlap.svg")
    _parse("--engine ours,ours:low_latency --workload crowd --repeats 1 --threads 1")
    _parse("--shape qwen3-0.6b --workload filters text --kv-bytes 1000000")
    _parse("--shape qwen3-0.6b --workload exact --tensor-parallel 1 2 --kv-bytes 8000000000")
    _parse(f"--workload {' '.join((*NAMES, *ALONE))} --json out.json")
    assert (tmp_path / "docs").is_dir()


def test_a_report_without_matplotlib_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def without(name: str) -> Any:
        return None if name == "matplotlib" else find(name)

    monkeypatch.setattr("importlib.util.find_spec", without)
    with pytest.raises(SystemExit):
        _parse(f"--report {tmp_path / 'report'}")
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folders_of_outputs_are_made_or_refused(
    machine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine("cuda")
    out = tmp_path / "a" / "b" / "out"
    _parse(f"--workload small overlap --json {out}.json --timeline {out}.svg")
    assert out.parent.is_dir()
    file = tmp_path / "file"
    file.write_text("")
    for option, path in (("json", out.parent), ("json", file / "out"), ("profile", file)):
        with pytest.raises(SystemExit):
            _parse(f"--{option} {path}")
        assert f"argument --{option}" in capsys.readouterr().err
