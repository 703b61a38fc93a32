from __future__ import annotations

from contextlib import closing

import pytest

from engine.types import PrefillChunk, StepPlan
from llm import Progress

PREFILL = StepPlan(0, prefill=(PrefillChunk(0, 0, 100, True),))
DECODE = StepPlan(1, decode=(0, 1, 2))


def test_counts_requests_and_shows_both_rates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("llm.time.perf_counter", lambda: next(now))
    with closing(Progress(2, enabled=True)) as progress:
        progress.update(PREFILL, 1, 0)
        progress.update(DECODE, len(DECODE.decode), 1)
        progress.update(DECODE, len(DECODE.decode), 1)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    # 100 tokens in one second; six in two and four seconds.
    assert "prefill=100 tok/s" in shown
    assert "decode=1 tok/s" in shown


def test_a_step_without_a_plan_counts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Progress(1, enabled=True)) as progress:
        progress.update(None, 0, 0)
    assert "0/1" in capsys.readouterr().err


def test_disabled_it_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Progress(1, enabled=False)) as progress:
        progress.update(PREFILL, 1, 1)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_closed_bar_shows_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(1, enabled=True)
    with pytest.raises(ZeroDivisionError), closing(progress):
        _ = 1 // 0
    assert capsys.readouterr().err.endswith("\n")
    progress.update(PREFILL, 1, 1)
    assert capsys.readouterr().err == ""
