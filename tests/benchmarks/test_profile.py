"""Where the time goes: phases add up, kernels are named, the trace can be opened."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

import bench
from benchmarks.profile import Profile, Share, profile, shares, tables
from benchmarks.spans import Span
from benchmarks.workloads import Workload, random_workload
from tests.checkpoints import Checkpoints


def test_a_phase_does_not_count_what_is_inside_it() -> None:
    spans = [
        Span(0, "plan", 0.0, 1.0),
        Span(0, "launch", 1.0, 6.0),
        Span(0, "stage", 2.0, 4.0),
        Span(0, "device", 2.0, 20.0),
        Span(1, "launch", 7.0, 8.0),
        Span(0, "commit", 8.0, 11.0),
        Span(-1, "detokenize", 9.0, 10.0),
        # In a thread of its own, while the next step is planned.
        Span(1, "plan", 12.0, 15.0),
        Span(1, "stage", 13.0, 14.0),
    ]
    assert shares(reversed(spans)) == [
        Share("plan", 2, 4.0),
        Share("stage", 2, 3.0),
        Share("launch", 2, 4.0),
        Share("commit", 1, 2.0),
        Share("detokenize", 1, 1.0),
        Share("device", 1, 18.0),
    ]


@pytest.mark.parametrize("depth", [0, 1])
def test_every_phase_and_the_kernels_of_a_run(tmp_path: Path, shipped: Path, depth: int) -> None:
    work = random_workload("w", 2, (9, 9), (4, 6), 200)
    found = profile(str(shipped), work, tmp_path / "p", device="cpu", pipeline_depth=depth)
    calls = {share.name: share.calls for share in found.phases}
    # One step for the prompts, one for each token after the first.
    assert found.num_steps == max(work.lengths)
    for phase in ("launch", "wait", "commit"):
        assert calls[phase] == found.num_steps
    assert calls["plan"] >= found.num_steps
    assert calls["stage"] >= 1
    assert calls["detokenize"] >= 2
    assert all(share.seconds > 0 for share in found.phases)
    assert sum(share.seconds for share in found.phases if share.name != "stage") <= found.seconds
    # torch's profiler does not see operators of the worker thread.
    assert any("linear" in kernel.name for kernel in found.kernels) == (depth == 0)
    assert not {kernel.name for kernel in found.kernels} & set(calls)
    with gzip.open(tmp_path / "p" / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert names >= {"plan", "launch", "commit", "detokenize"}


def test_tables_show_the_longest() -> None:
    kernels = [Share(f"kernel{i}|", i, 10.0 - i) for i in range(1, 4)]
    work = Workload("some work", [[1]], [2])
    text = tables(Profile(work, 2, 8.0, [Share("plan", 4, 2.0)], kernels), most=2)
    assert "some work" in text
    assert "| plan  |       4 |   2000.00 |   1000.0000 |  25.0% |" in text
    assert "kernel1/" in text
    assert "kernel3" not in text
    assert "1 more: 7000.00 ms." in text


def test_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    checkpoints: Checkpoints,
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.py", "--nvtx"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main()
    assert "argument --nvtx: needs a CUDA device" in capsys.readouterr().err
    arguments = ["--profile", str(tmp_path / "out"), "--workload", "small"]
    arguments += ["--model", str(checkpoints["qwen3-gqa6"])]
    monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
    bench.main()
    assert "| commit " in capsys.readouterr().out
    assert "| launch " in (tmp_path / "out" / "README.md").read_text()
