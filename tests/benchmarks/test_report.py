"""A report on made-up figures: every file is written, every row and problem is on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.compare import Contender, Measured, Row
from benchmarks.engines import Trace
from benchmarks.reference import Agreement
from benchmarks.report import CAPTIONS, write_report
from benchmarks.spans import Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

pytest.importorskip("matplotlib")

WORK = "many of them"
PHASES = {"plan": 0.1, "launch": 0.5, "stage": 0.1, "wait": 0.3, "commit": 0.1, "device": 0.7}


def _trace(period: float) -> Trace:
    times = [[period * (i + 1) for i in range(5)] for _ in range(2)]
    spans = [
        Span(i, phase, period * i, period * (i + share))
        for i in range(5)
        for phase, share in PHASES.items()
    ]
    return Trace(times, spans)


def _engine(name: str, trace: Trace | None) -> Measured:
    one = Measured(Contender(name, name.partition(":")[0]), 3.25, 1.5)
    if trace is not None:
        one.traces = {WORK: trace, "another": trace}
    one.warmups[WORK] = 0.75
    one.agreements[WORK] = Agreement(9, 10)
    return one


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    rows = [
        Row(WORK, "ours", 10, [0.5, 0.4], 0.75, 0.2, "vllm", [2.0, 3.0], 3 << 30),
        Row(WORK, "vllm", 10, [1.0, 1.2], 0.75, 0.2),
        Row("another", "ours", 7, [0.01]),
        Row("first token of 9", "ours", 1, [0.0021, 0.0019, 0.0024], 0.75, 0.001, "vllm", [3.0]),
    ]
    found = [_engine("ours", _trace(0.01)), _engine("vllm", None), _engine("nano-vllm", None)]
    found[2].problem = "RuntimeError: no device"
    write_report(tmp_path / "a" / "b", {"host": "a machine"}, found, rows)
    folder = tmp_path / "a" / "b"
    assert {f.name for f in folder.iterdir()} == {"README.md", "results.json", *CAPTIONS}
    page = (folder / "README.md").read_text()
    for row in rows[:-1]:
        assert f"| {row.workload} | {row.engine} | {row.median:,.1f} |" in page
    assert "| first token of 9 | ours | 2.10 ms | 1.90 to 2.40 ms | 3.00 x vllm | 0.476 |" in page
    for text in ("a machine", "2.50 x vllm", "0.450", "3.00 GiB", "RuntimeError: no device"):
        assert text in page
    assert "tell no times: vllm." in page
    assert "| many of them | ours | 10.0 ms | 10.0 ms | 10.0 ms | 10.0 ms | 10.0 ms |" in page
    assert "the plots are of many of them." in page
    assert all(f"]({name})" in page for name in CAPTIONS)
    for name in CAPTIONS:
        data = (folder / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 5_000 < len(data) < 100_000
    assert len(json.loads((folder / "results.json").read_text())["rows"]) == len(rows)


def test_without_traces_there_is_the_throughput_alone(tmp_path: Path) -> None:
    write_report(tmp_path, {}, [_engine("vllm", None)], [Row("w", "vllm", 3, [1.0])])
    assert {f.suffix for f in tmp_path.iterdir()} == {".md", ".json", ".png"}
    assert [f.name for f in tmp_path.glob("*.png")] == ["throughput.png"]
    assert "## Latency" not in (tmp_path / "README.md").read_text()


def test_first_tokens_are_drawn_in_milliseconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bars, their spread, the limit and the axis; and there is no plot of rates without rates."""
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, path, **options: figures.update({path.name: figure}),
    )
    row = Row("first token of 9", "ours", 1, [0.0021, 0.0019, 0.0025], limit_seconds=0.001)
    write_report(tmp_path, {}, [_engine("ours", None)], [row])
    assert list(figures) == ["first_tokens.png"]
    (ax,) = figures["first_tokens.png"].axes
    assert ax.get_ylabel() == "milliseconds"
    (bar,) = ax.patches
    assert bar.get_extents().transformed(ax.transData.inverted()).height == pytest.approx(2.1)
    assert {"2.1", "limit 1"} <= {text.get_text() for text in ax.texts}
    assert "tok/s" not in (tmp_path / "README.md").read_text()


def test_without_any_rate_the_page_says_why(tmp_path: Path) -> None:
    one = _engine("ours", _trace(0.01))
    one.problem = "wrong outputs"
    write_report(tmp_path, {}, [one], [])
    assert not list(tmp_path.glob("*.png"))
    assert "| ours | wrong outputs |" in (tmp_path / "README.md").read_text()


def test_page_and_plot_tell_the_same_percentiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten gaps of 1 to 10 ms: half of them are at most 5 ms, and 99 % at most 10 ms."""
    labels: list[str] = []

    def note(figure: Figure, path: Path, **options: Any) -> None:
        for ax in figure.axes if path.name == "latency.png" else ():
            legend = ax.get_legend()
            assert legend is not None
            labels.extend(text.get_text() for text in legend.get_texts())

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", note)
    times = [[0.1 + sum(range(i + 1)) / 1e3 for i in range(11)]]
    one = _engine("ours", Trace(times, _trace(0.01).spans))
    write_report(
        tmp_path, {}, [one], [Row(WORK, "ours", 11, [1.0]), Row("another", "ours", 1, [1.0])]
    )
    assert labels == ["ours: median 100, p99 100 ms", "ours: median 5, p99 10 ms"]
    page = (tmp_path / "README.md").read_text()
    assert f"| {WORK} | ours | 100.0 ms | 100.0 ms | 5.0 ms | 10.0 ms | 10.0 ms |" in page


def test_figures_are_written_before_the_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise ImportError("no matplotlib")

    monkeypatch.setattr("benchmarks.plots.draw_plots", fail)
    with pytest.raises(ImportError):
        write_report(tmp_path, {}, [_engine("vllm", None)], [Row("w", "vllm", 3, [1.0])])
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 1
