"""Engines in processes, and what becomes of those that are missing, fail or answer wrongly."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from benchmarks import compare
from benchmarks.compare import Contender, Measured, Row, judge, measure_engines, rows_of
from benchmarks.engines import VLLM, Setting, Trace, Transformers
from benchmarks.processes import EngineFailedError, EngineProcess, Ran, peak_host_bytes
from benchmarks.reference import Agreement, Reference, WrongOutputError
from benchmarks.report import write_report
from benchmarks.spans import Span
from benchmarks.words import describe_engine, describe_row
from benchmarks.workloads import Workload, random_workload
from tests.checkpoints import Checkpoints

WORK = random_workload("w", 3, (4, 9), (3, 6), 200, checked=True)


@pytest.fixture
def setting(checkpoints: Checkpoints) -> Setting:
    return Setting(str(checkpoints["qwen3-gqa6"]), "float32", "cpu", 256, threads=1)


def test_one_command_from_engines_to_a_report(
    checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Engines take turns in processes of their own, missing ones are named, all is written."""
    arguments = [
        *("--engine", "ours,transformers,vllm", "--workload", "small", "--repeats", "2"),
        *("--report", str(tmp_path / "report"), "--json", str(tmp_path / "out.json")),
        *("--model", str(checkpoints["qwen3-gqa6"])),
    ]
    monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
    monkeypatch.setattr(VLLM, "module", "no_such_package")
    bench.main()
    out = capsys.readouterr().out
    assert "vllm: not installed, left out" in out
    for engine in ("ours", "transformers"):
        found = re.search(rf"{engine}: ready after .* (\d+) of (\d+) greedy tokens", out)
        assert found is not None
        assert 200 < int(found[1]) <= int(found[2])
    assert " times transformers (" in out
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 2
    page = (tmp_path / "report" / "README.md").read_text()
    assert "| 8 of 16 to 64 | ours |" in page
    assert (tmp_path / "report" / "timeline.png").stat().st_size > 5_000


def test_only_missing_engines_are_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench.py", "--engine", "vllm"])
    monkeypatch.setattr(VLLM, "module", "no_such_package")
    with pytest.raises(SystemExit, match="none of the engines is installed"):
        bench.main()


@pytest.mark.skipif(VLLM.missing() is None, reason="it is installed")
def test_a_process_that_fails_says_why(setting: Setting) -> None:
    with pytest.raises(EngineFailedError, match="No module named 'vllm'"):
        EngineProcess("vllm", setting)


def test_a_process_that_ends_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.processes._SERVE", "import os; os._exit(7)")
    with pytest.raises(EngineFailedError, match="ended with exit code 7"):
        EngineProcess("ours", Setting("", "float32", "cpu", 256))


class _Process:
    """An engine without a process: `bad` does not start, `late` fails at its second run.

    `dark` fails when it is watched for the second time.
    """

    startup_seconds = construct_seconds = 0.0

    def __init__(self, name: str, setting: Setting) -> None:
        self._kind = setting.options.get("kind")
        self._num_runs = self._num_watched = 0
        if self._kind == "bad":
            raise EngineFailedError("does not start")

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, work: Workload) -> Ran:
        self._num_runs += 1
        if self._kind == "late" and self._num_runs == 2:
            raise EngineFailedError("lost its device")
        extra = self._kind == "long"
        return Ran(self._num_runs / 4, [[1] * (n + extra) for n in work.lengths], 5 << 20)

    def watch(self, work: Workload) -> Trace:
        self._num_watched += 1
        if self._kind == "dark" and self._num_watched == 2:
            raise EngineFailedError("cannot be watched")
        assert self._num_watched <= 3
        spans = [Span(0, "step", 0.1, 0.5), Span(1, "step", 0.5, 0.7)]
        return Trace([[0.5, 0.7] for _ in work.lengths], spans)


def test_an_engine_that_fails_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, setting: Setting
) -> None:
    monkeypatch.setattr(compare, "EngineProcess", _Process)
    kinds = ("bad", "late", "good", "long")
    contenders = [Contender(kind, "ours", {"kind": kind}) for kind in kinds]
    (found,) = measure_engines(contenders, setting, [WORK], repeats=2)
    problems = ["does not start", "lost its device", None, "wrong outputs, so no rate: wrong"]
    for one, problem in zip(found, problems, strict=True):
        assert (one.problem or "").startswith(problem or "")
        assert bool(one.problem) == bool(problem)
        assert (one.problem or "greedy") in describe_engine(one)
    (row,) = rows_of(found, [WORK], None, "bad")
    assert (row.engine, row.warmup_seconds, row.seconds) == ("good", 0.25, [0.5, 0.75])
    assert row.peak_bytes == 5 << 20


def test_a_watch_that_fails_costs_no_rate(
    monkeypatch: pytest.MonkeyPatch, setting: Setting, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(compare, "EngineProcess", _Process)
    contenders = [Contender(kind, "ours", {"kind": kind}) for kind in ("dark", "good")]
    works = [replace(WORK, name=name) for name in ("first", "second", "third")]
    (found,) = measure_engines(contenders, setting, works, repeats=2, watch=True)
    dark, good = found
    assert (dark.problem, dark.watch_problem) == (None, "second: cannot be watched")
    assert (list(dark.traces), len(good.traces)) == (["first"], 3)
    assert "not watched: second: cannot be watched" in describe_engine(dark)
    rows = rows_of(found, works, None, None)
    assert [row.engine for row in rows] == ["dark", "good"] * 3
    write_report(tmp_path, {}, found, rows)
    page = (tmp_path / "README.md").read_text()
    assert "Watching dark failed at second: cannot be watched" in page
    assert "| third | dark |" in page


def _measured(label: str, outputs: list[list[int]], seconds: list[float]) -> Measured:
    one = Measured(Contender(label, "ours"))
    one.outputs[WORK.name], one.seconds[WORK.name] = outputs, seconds
    one.warmups[WORK.name], one.peak_bytes[WORK.name] = 9.0, 1 << 30
    return one


def test_a_wrong_token_takes_the_rate_away(setting: Setting) -> None:
    right = Transformers(setting).generate(WORK)
    wrong = [list(out) for out in right]
    wrong[1][2] = (wrong[1][2] + 1) % 200
    found = [_measured("right", right, [2.0]), _measured("wrong", wrong, [1.0])]
    judge(found, [WORK], Reference(setting))
    total = WORK.num_output_tokens
    assert found[0].agreements == {"w": Agreement(total, total)}
    assert "token 2 of request 1" in str(found[1].problem)
    assert [row.engine for row in rows_of(found, [WORK], None, None)] == ["right"]


@pytest.mark.parametrize("where", [slice(None), 3])
def test_a_reference_of_nan_vouches_for_nothing(setting: Setting, where: Any) -> None:
    reference = Reference(setting)
    right = Transformers(setting).generate(WORK)
    model = reference.model

    def broken(ids: Any, logits_to_keep: int) -> Any:
        out = model(ids, logits_to_keep=logits_to_keep)
        out.logits[0, -1, where] = float("nan")
        return out

    broken.device = model.device  # type: ignore[attr-defined]
    reference.model = broken
    with pytest.raises(WrongOutputError, match="misses the reference's largest logit by nan"):
        reference.judge(WORK, right)


@pytest.mark.parametrize("off", [0, 1])
def test_what_seems_wrong_in_half_precision_is_judged_in_float32(
    setting: Setting, off: int
) -> None:
    right = Transformers(setting).generate(WORK)
    right[1][2] ^= off
    reference = Reference(replace(setting, dtype="bfloat16"))
    model = reference.model

    def rounded(ids: Any, logits_to_keep: int) -> Any:
        out = model(ids, logits_to_keep=logits_to_keep)
        # Far beyond the rounding of bfloat16.
        out.logits += torch.randn_like(out.logits) * out.logits.std()
        return out

    rounded.device = model.device  # type: ignore[attr-defined]
    reference.model = rounded
    if off:
        with pytest.raises(WrongOutputError, match="token 2 of request 1"):
            reference.judge(WORK, right)
    else:
        assert reference.judge(WORK, right).total == WORK.num_output_tokens


def test_speedups_are_taken_repeat_by_repeat() -> None:
    tokens = [[1] * n for n in WORK.lengths]
    found = [_measured("a", tokens, [4.0, 9.0]), _measured("b", tokens, [2.0, 3.0])]
    first, second = rows_of(found, [WORK], lambda contender, work: 0.5, "a")
    assert (first.speedups, second.speedups) == (None, [2.0, 3.0])
    assert second.limit == 2 * WORK.num_output_tokens
    words = describe_row(second)
    assert "2.50 times a (2.00 to 3.00)" in words
    assert f"{second.median / second.limit:.3f} of the limit" in words


def test_first_tokens_are_told_in_milliseconds() -> None:
    words = describe_row(
        Row("first token of 9", "a", 1, [0.003, 0.002, 0.004], limit_seconds=0.0015)
    )
    assert "3.00 ms (2.00 to 4.00 in 3)  0.500 of the limit 1.50 ms" in words
    assert "tok/s" not in words


def test_the_peak_is_of_this_process() -> None:
    before = peak_host_bytes()
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"1" * len(block[:: 1 << 12])
    assert peak_host_bytes() >= max(before, 64 << 20)


def test_every_token_counts() -> None:
    row = Row("w", "a", 100, [2.0, 4.0, 5.0])
    assert row.rates == [20.0, 25.0, 50.0]
    assert row.median == 25.0
    assert Workload("w", [[1], [2]], [3, 4]).num_output_tokens == 7
    assert replace(row, limit_seconds=1.0).limit == 100
