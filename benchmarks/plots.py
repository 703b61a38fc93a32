"""The plots of a report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.compare import Row
from benchmarks.engines import Trace
from benchmarks.spans import Span
from engine.outputs import percentile

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
_PHASES = {
    "plan": "#4c78a8",
    "launch": "#f58518",
    "stage": "#ffd27f",
    "wait": "#dddddd",
    "commit": "#54a24b",
    "detokenize": "#e45756",
    "device": "#b279a2",
    "step": "#9d9d9d",
}
# Steps that the timeline shows of the engine that takes longest for one.
_NUM_STEPS = 4
_DPI = 110


def draw_plots(folder: Path, rows: Sequence[Row], traces: dict[str, Trace]) -> list[str]:
    """Draw what there are figures for; returns the names of the files."""
    engines = list(dict.fromkeys([*(row.engine for row in rows), *traces]))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(engines)}
    figures: dict[str, Figure] = {}
    if rates := [row for row in rows if not row.is_first_token]:
        figures["throughput.png"] = _bars(rates, colours)
    if firsts := [row for row in rows if row.is_first_token]:
        figures["first_tokens.png"] = _bars(firsts, colours)
    if traces:
        figures["tokens.png"] = _tokens(traces, colours)
        figures["latency.png"] = _latency(traces, colours)
        figures["timeline.png"] = _timeline(traces)
    with mpl.rc_context({"font.size": 9}):
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=_DPI)
    return list(figures)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return figure, list(axes)


def _bars(rows: Sequence[Row], colours: dict[str, str]) -> Figure:
    """A panel of bars per workload: rates, or first tokens in ms; the limit as a line across."""
    works = list(dict.fromkeys(row.workload for row in rows))
    longest = max(sum(row.workload == work for row in rows) for work in works)
    width = max(5.0, len(works) * (1.2 + 0.9 * longest))
    figure, axes = _figure(width, 3.6, len(works))
    for ax, work in zip(axes, works, strict=True):
        own = [row for row in rows if row.workload == work]
        names = [row.engine for row in own]
        values = [row.milliseconds if row.is_first_token else row.rates for row in own]
        medians = [statistics.median(rising) for rising in values]
        spread = [
            [median - rising[0] for median, rising in zip(medians, values, strict=True)],
            [rising[-1] - median for median, rising in zip(medians, values, strict=True)],
        ]
        bars = ax.bar(names, medians, yerr=spread, capsize=4, color=[colours[n] for n in names])
        limit = own[0].limit
        if limit is not None and own[0].is_first_token:
            limit = 1e3 / limit
        # Inside the bars, or above those that are too low for it.
        top = max(*medians, limit or 0.0)
        for inside, place in ((True, "center"), (False, "edge")):
            labels = [_number(m) if (m > 0.15 * top) is inside else "" for m in medians]
            ax.bar_label(bars, labels=labels, label_type=place, padding=0 if inside else 2)
        if limit is not None:
            ax.axhline(limit, color="black", linestyle="--", linewidth=1)
            ax.annotate(
                f"limit {_number(limit)}",
                (1, limit),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
            )
        ax.set_title(work)
        ax.grid(visible=False, axis="x")
    unit = "milliseconds" if rows[0].is_first_token else "output tokens / s"
    axes[0].set_ylabel(unit)
    return figure


def _tokens(traces: dict[str, Trace], colours: dict[str, str]) -> Figure:
    figure, (ax,) = _figure(7, 3.6)
    for name, trace in traces.items():
        times = sorted(t for ts in trace.token_times for t in ts)
        counts = list(accumulate(1 for _ in times))
        ax.plot([0, *times], [0, *counts], color=colours[name], label=name)
    ax.set_xlabel("seconds")
    ax.set_ylabel("output tokens so far")
    ax.legend()
    return figure


def _latency(traces: dict[str, Trace], colours: dict[str, str]) -> Figure:
    """Cumulative distributions; percentiles are where these curves reach their share."""
    figure, axes = _figure(9, 3.6, 2)
    for name, trace in traces.items():
        for ax, rising in zip(axes, (trace.first_tokens, trace.gaps), strict=True):
            if not rising:
                continue
            values = [1e3 * value for value in rising]
            shares = [(i + 1) / len(values) for i in range(len(values))]
            middle, tail = (_number(percentile(values, share)) for share in (0.5, 0.99))
            label = f"{name}: median {middle}, p99 {tail} ms"
            # A single value is a step that needs a beginning.
            ax.step(
                [values[0], *values], [0, *shares], where="post", color=colours[name], label=label
            )
    for ax, title in zip(axes, ("time to the first token", "time between tokens"), strict=True):
        ax.set_title(title)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        # At least a decade, or there would be no tick with a number.
        ax.set_xlim(low / 1.5, max(1.5 * high, 15 * low))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, place: _number(value)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("milliseconds")
        ax.set_ylim(0, 1.3)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        ax.legend(loc="upper left", fontsize=8)
    axes[0].set_ylabel("share of all that took at most")
    return figure


def _timeline(traces: dict[str, Trace]) -> Figure:
    """A lane for each phase of each engine, over one window of time."""
    window = _NUM_STEPS * max(_period(trace) for trace in traces.values())
    lanes: dict[tuple[str, str], list[Span]] = {}
    for name, trace in traces.items():
        start = _middle(trace)
        for span in sorted(trace.spans, key=lambda span: list(_PHASES).index(span.phase)):
            if span.end > start and span.start < start + window:
                lanes.setdefault((name, span.phase), []).append(span.shifted(-start))
    figure, (ax,) = _figure(10, 1.0 + 0.3 * len(lanes))
    for y, ((_, phase), spans) in enumerate(lanes.items()):
        bars = [_bar(span, window) for span in spans]
        ax.broken_barh(bars, (y - 0.4, 0.8), facecolors=_PHASES[phase])
    ax.set_yticks(range(len(lanes)), [f"{name}: {phase}" for name, phase in lanes])
    ax.set_xlim(0, 1e3 * window)
    ax.set_ylim(len(lanes) - 0.5, -0.5)
    ax.set_xlabel("milliseconds")
    ax.grid(visible=False, axis="y")
    return figure


def _bar(span: Span, window: float) -> tuple[float, float]:
    """Start and width in milliseconds; short ones are widened until they are seen."""
    begin, end = max(span.start, 0), min(span.end, window)
    # Neighbours in a lane stay apart.
    width = max((end - begin) - window / 500, window / 500)
    return 1e3 * begin, 1e3 * width


def _starts(trace: Trace) -> list[float]:
    """When each step began."""
    starts: dict[int, float] = {}
    for span in trace.spans:
        if span.step_id >= 0 and span.phase != "device":
            starts.setdefault(span.step_id, span.start)
            starts[span.step_id] = min(starts[span.step_id], span.start)
    return sorted(starts.values())


def _period(trace: Trace) -> float:
    starts = _starts(trace)
    return statistics.median(b - a for a, b in pairwise(starts)) if len(starts) > 1 else 0.0


def _middle(trace: Trace) -> float:
    starts = _starts(trace)
    return starts[len(starts) // 2] if starts else 0.0
