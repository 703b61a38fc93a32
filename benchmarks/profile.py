"""Where the time of a run goes: by phase of the host, and by kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.recording import PHASES, Recorder, recorded_llm
from benchmarks.spans import Span
from benchmarks.workloads import Workload
from llm import LLM

# A trace of more steps than these takes minutes to write and to open.
_MOST_STEPS = 48
# Phases that are parts of others.
_INSIDE = {"stage": "launch", "detokenize": "commit"}
# Names of kernels from templates run to hundreds of characters.
_WIDTH = 80


@dataclass(frozen=True)
class Share:
    """What a phase or a kernel took, in seconds; a phase without the phases inside it."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """One run.

    Attributes:
        seconds: wall time of the run that `phases` are of.
        phases: of the host, in the order of a step, and "device": what the device was busy.
        kernels: of the same run once more under torch's profiler, the longest first; on a CPU
            operators.
    """

    work: Workload
    num_steps: int
    seconds: float
    phases: list[Share]
    kernels: list[Share]


def profile(model: str, work: Workload, folder: Path | None, **options: Any) -> Profile:
    """Run a workload, its outputs cut short, with its phases recorded; then again for the kernels.

    Args:
        folder: for torch's trace, trace.json.gz, to be opened in a browser (ui.perfetto.dev). None:
            no profiler but NVTX ranges around the phases in both runs, for another tool's.
        options: of the LLM.
    """
    work = replace(work, lengths=[min(n, _MOST_STEPS) for n in work.lengths])
    nvtx: Any = torch.cuda.nvtx.range
    mark = nvtx if folder is None else torch.profiler.record_function
    recorder = Recorder(mark)
    with recorded_llm(model, recorder, **options) as llm:
        run = partial(_generate, llm, work)
        run()
        recorder.clear()
        start = recorder.now()
        run()
        recorder.resolve()
        seconds = recorder.now() - start
        spans = list(recorder.spans)
        kernels = _kernels(run, folder) if folder is not None else []
    num_steps = len({span.step_id for span in spans if span.phase == "launch"})
    return Profile(work, num_steps, seconds, shares(spans), kernels)


def _generate(llm: LLM, work: Workload) -> None:
    llm.reset_prefix_cache()
    llm.generate(work.prompts, work.sampling_params(), use_tqdm=False)


def _kernels(run: partial[None], folder: Path) -> list[Share]:
    """Run under torch's profiler, write its trace, and add up its kernels.

    Operators of a worker thread (a CPU with pipeline_depth=1) are hidden from the profiler.
    """
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    where = "CUDA" if cuda else "CPU"
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [
        Share(event.key, event.count, getattr(event, time) / 1e6)
        for event in profiler.key_averages()
        # The marks of the phases are shown on the device as well.
        if event.device_type.name == where and event.key not in PHASES
    ]
    return sorted(found, key=lambda share: -share.seconds)


def shares(spans: Iterable[Span]) -> list[Share]:
    """The time of each phase without that of the phases inside it."""
    calls = dict.fromkeys((*PHASES, "device"), 0)
    seconds = dict.fromkeys(calls, 0.0)
    open_: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        calls[span.phase] += 1
        seconds[span.phase] += span.end - span.start
        if span.phase == "device":
            continue
        while open_ and open_[-1].end < span.end:
            open_.pop()
        # A step that runs in a thread of its own is inside nothing.
        if open_ and _INSIDE.get(span.phase) == open_[-1].phase:
            seconds[open_[-1].phase] -= span.end - span.start
        open_.append(span)
    return [Share(name, calls[name], seconds[name]) for name in calls if calls[name]]


def tables(found: Profile, most: int = 25) -> str:
    """The phases and the kernels that took most, as Markdown."""
    work, steps = found.work, found.num_steps
    parts = [
        f"{work.name}, outputs of at most {_MOST_STEPS} tokens: {steps} steps in "
        f"{found.seconds:.3f} s.",
        _table("phase", found.phases, found.seconds, steps),
    ]
    if found.kernels:
        total = sum(kernel.seconds for kernel in found.kernels)
        parts.append(_table("kernel", found.kernels[:most], total, steps))
        if len(found.kernels) > most:
            rest = sum(kernel.seconds for kernel in found.kernels[most:])
            parts.append(f"{len(found.kernels) - most} more: {1e3 * rest:.2f} ms.")
    return "\n\n".join(parts)


def _table(head: str, rows: list[Share], total: float, steps: int) -> str:
    width = max(len(head), *(len(row.name[:_WIDTH]) for row in rows))
    lines = [
        f"| {head:<{width}} |   calls | ms in all | ms per step |  share |",
        f"|{'-' * (width + 2)}|--------:|----------:|------------:|-------:|",
    ]
    for row in rows:
        name = row.name[:_WIDTH].replace("|", "/")
        lines.append(
            f"| {name:<{width}} | {row.calls:>7} | {1e3 * row.seconds:>9.2f} "
            f"| {1e3 * row.seconds / steps:>11.4f} | {row.seconds / total:>6.1%} |"
        )
    return "\n".join(lines)
