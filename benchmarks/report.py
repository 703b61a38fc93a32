"""A page about a comparison: tables in Markdown, plots as PNG (needs matplotlib)."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.compare import Measured, Row, figures_of
from engine.outputs import percentile

# File names of the plots and what they show.
CAPTIONS = {
    "throughput.png": "Output tokens per second: median, and least to most of the repeats.",
    "first_tokens.png": "Milliseconds to the first token: median, and least to most.",
    "tokens.png": "Output tokens over time, all requests together.",
    "latency.png": "Time to the first token, and between the tokens of a request.",
    "timeline.png": "Steps from the middle of the run.",
}

_ENGINE_HEAD = ("engine", "ready after", "construction", "warm-ups", "greedy tokens")
_LATENCY_HEAD = (
    *("workload", "engine", "to the first token: median", "p99"),
    *("between tokens: median", "p99", "longest"),
)
_RATE_HEAD = (
    *("workload", "engine", "tok/s", "least to most", "time", "tokens", "speed-up"),
    *("of the limit", "memory"),
)
_FIRST_TOKEN_HEAD = (
    *("workload", "engine", "first token", "least to most", "speed-up", "of the limit", "memory"),
)


def write_report(
    folder: Path,
    about: dict[str, str],
    found: Sequence[Measured],
    rows: Sequence[Row],
) -> None:
    """Write README.md, results.json and the plots into a folder, which is made if need be.

    Args:
        about: the environment, by names.
        found: the engines, those with a problem too. The plots over time are of the workload
            with the most output tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # First, as drawing may fail and the figures took long.
    results = figures_of(about, found, rows)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    from benchmarks.plots import draw_plots

    good = [one for one in found if one.problem is None]
    tokens = {row.workload: row.output_tokens for row in rows}
    watched = max({name for one in good for name in one.traces}, key=tokens.__getitem__, default="")
    traces = {one.engine: one.traces[watched] for one in good if watched in one.traces}
    drawn = draw_plots(folder, rows, traces)
    parts = [
        "# Comparison of engines",
        f"Written by `python bench.py {shlex.join(sys.argv[1:])}`. Every engine ran in a process "
        "of its own, on the same prompts, lengths and data type. A rate is shown if every greedy "
        "token of the engine is the one that transformers would take after the same tokens, up "
        "to rounding.",
        _table(("", ""), about.items()),
        "## Engines",
        _table(_ENGINE_HEAD, map(_engine, found)),
        "Ready is counted from the start of the process. Greedy tokens: those equal to the most "
        "likely one of transformers; the others are ties up to rounding.",
        *(
            f"Watching {one.engine} failed at {one.watch_problem}"
            for one in good
            if one.watch_problem
        ),
        "## Throughput",
        *_tables(rows),
        "Speed-ups are medians over pairs of repeats. The limit is the roofline from the bandwidth "
        "and matmul rate measured in the same run, on CUDA. Memory is the most that was held: of "
        "the device on CUDA, else of the process.",
        *_plots(drawn, ("throughput.png", "first_tokens.png")),
    ]
    if watched:
        silent = [one.engine for one in good if one.engine not in traces]
        parts += [
            "## Latency",
            "All requests come at once. From one more run of each workload, with its steps "
            f"watched; the plots are of {watched}. Half of the values, or 99 %, are at most the "
            "median, or p99.",
            _table(_LATENCY_HEAD, _latencies(good)),
            *([f"Engines that tell no times: {', '.join(silent)}."] if silent else []),
            *_plots(drawn, ("latency.png", "tokens.png", "timeline.png")),
        ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def _plots(drawn: Sequence[str], names: Sequence[str]) -> list[str]:
    return [f"{CAPTIONS[name]}\n\n![{CAPTIONS[name]}]({name})" for name in names if name in drawn]


def _table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _engine(one: Measured) -> tuple[str, ...]:
    if one.problem is not None:
        return one.engine, one.problem, "", "", ""
    return (
        one.engine,
        f"{one.startup_seconds:.1f} s",
        f"{one.construct_seconds:.1f} s",
        ", ".join(f"{seconds:.2f} s" for seconds in one.warmups.values()),
        ", ".join(str(agreement) for agreement in one.agreements.values()),
    )


def _latencies(good: Iterable[Measured]) -> list[tuple[str, ...]]:
    found = [(name, one.engine, t) for one in good for name, t in one.traces.items()]
    return [
        (
            name,
            engine,
            *_milliseconds(trace.first_tokens, (0.5, 0.99)),
            *_milliseconds(trace.gaps, (0.5, 0.99, 1.0)),
        )
        for name, engine, trace in sorted(found, key=lambda entry: entry[0])
    ]


def _milliseconds(rising: list[float], shares: tuple[float, ...]) -> list[str]:
    """Percentiles in words, empty without values."""
    return [f"{1e3 * percentile(rising, share):,.1f} ms" if rising else "" for share in shares]


def _tables(rows: Sequence[Row]) -> list[str]:
    """Rates, then first tokens, whose times are in milliseconds; either only if there are some."""
    rates = [row for row in rows if not row.is_first_token]
    firsts = [row for row in rows if row.is_first_token]
    tables = [_table(_RATE_HEAD, map(_rate, rates))] if rates or not firsts else []
    return tables + ([_table(_FIRST_TOKEN_HEAD, map(_first_token, firsts))] if firsts else [])


def _rate(row: Row) -> tuple[str, ...]:
    return (
        row.workload,
        row.engine,
        f"{row.median:,.1f}",
        f"{row.rates[0]:,.1f} to {row.rates[-1]:,.1f}",
        f"{statistics.median(row.seconds):.3f} s",
        f"{row.output_tokens:,}",
        *_beside(row),
    )


def _first_token(row: Row) -> tuple[str, ...]:
    times = row.milliseconds
    return (
        row.workload,
        row.engine,
        f"{statistics.median(times):,.2f} ms",
        f"{times[0]:,.2f} to {times[-1]:,.2f} ms",
        *_beside(row),
    )


def _beside(row: Row) -> tuple[str, str, str]:
    """Speed-up, fraction of the limit and memory, each empty where there is none."""
    speedup = fraction = memory = ""
    if row.speedups is not None:
        speedup = f"{statistics.median(row.speedups):.2f} x {row.baseline}"
    if row.limit is not None:
        fraction = f"{row.median / row.limit:.3f}"
    if row.peak_bytes is not None:
        memory = f"{row.peak_bytes / 2**30:.2f} GiB"
    return speedup, fraction, memory
