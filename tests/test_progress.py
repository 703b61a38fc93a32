from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from engine.outputs import Progress
from engine.types import PrefillChunk, StepPlan

PREFILL = StepPlan(0, prefill=(PrefillChunk(0, 0, 100, True),))
DECODE = StepPlan(1, decode=(0, 1, 2))


def test_counts_requests_and_shows_both_rates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("engine.outputs.time.perf_counter", lambda: next(now))
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


def test_the_time_without_a_step_is_not_that_of_the_next(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr("engine.outputs.time.perf_counter", lambda: next(now))
    with closing(Progress(1, enabled=True)) as progress:
        progress.update(None, 0, 0)
        progress.update(PREFILL, 1, 1)
    assert "prefill=50 tok/s" in capsys.readouterr().err


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


def _closed(path: Path) -> Any:
    stream = path.open("w")
    stream.close()
    return stream


def _without_descriptor(path: Path) -> Any:
    # The stream may not close the number at its end: it may be another file's by then.
    number = os.dup(1)
    stream = os.fdopen(number, "w", closefd=False)
    os.close(number)
    return stream


class _BreaksLater(io.StringIO):
    def write(self, text: str) -> int:
        if self.tell():
            raise BrokenPipeError("nobody reads this any more")
        return super().write(text)


def _show_in_another_thread() -> None:
    """No bar holds the lock that all bars share, which its own thread would not notice."""
    thread = threading.Thread(target=lambda: Progress(1, enabled=True).close(), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        _closed,
        _without_descriptor,
        lambda path: io.BytesIO(),
        lambda path: object(),
        lambda path: _BreaksLater(),
    ],
    ids=["none", "closed", "no descriptor", "bytes", "no stream", "breaks later"],
)
@pytest.mark.filterwarnings("error")
def test_without_a_stderr_that_takes_text_nothing_is_shown_and_nothing_fails(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make(tmp_path / "stderr")
    monkeypatch.setattr(sys, "stderr", stream)
    with closing(Progress(3, enabled=True)) as progress:
        progress.update(PREFILL, 1, 0)
        progress.update(DECODE, 3, 1)
        progress.update(DECODE, 3, 2)
    monkeypatch.undo()
    _show_in_another_thread()


def test_without_any_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys, "stderr")
    with closing(Progress(3, enabled=True)) as progress:
        progress.update(PREFILL, 1, 0)
    monkeypatch.undo()
