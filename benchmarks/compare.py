"""Several engines on the same workloads: measured, judged, and put side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks.engines import ENGINES, Ours, Setting, Tokens, Trace
from benchmarks.latency import GroupLatency, Latency, by_group
from benchmarks.processes import EngineFailedError, EngineProcess, Ran
from benchmarks.reference import Agreement, Reference, WrongOutputError
from benchmarks.workloads import Workload
from config import PRESETS
from utils.errors import did_you_mean


@dataclass(frozen=True)
class Row:
    """One engine on one workload.

    Attributes:
        seconds: wall time of each repeat.
        warmup_seconds: of the first run, which does not count among the repeats.
        limit_seconds: the roofline of the workload, if it is known.
        speedups: over `baseline`, repeat by repeat: on a CPU both ran one after the other, so
            that a slow phase of the machine hits both.
        peak_bytes: most memory held until the end of the workload: of the device on CUDA, else
            of the process.
        agreement: of the engine's greedy tokens with transformers.
        latencies: of the workload's groups of requests, if it has any and the engine tells.
    """

    workload: str
    engine: str
    output_tokens: int
    seconds: list[float]
    warmup_seconds: float = 0.0
    limit_seconds: float | None = None
    baseline: str | None = None
    speedups: list[float] | None = None
    peak_bytes: int | None = None
    agreement: Agreement | None = None
    latencies: list[GroupLatency] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Output tokens per second of every repeat, rising."""
        return sorted(self.output_tokens / s for s in self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def is_first_token(self) -> bool:
        """Whether one token is all there is to generate: its time is told, and no rate."""
        return self.output_tokens == 1

    @property
    def milliseconds(self) -> list[float]:
        """Wall time of every repeat in milliseconds, rising."""
        return sorted(1e3 * s for s in self.seconds)

    @property
    def limit(self) -> float | None:
        """Output tokens per second at the roofline."""
        return None if self.limit_seconds is None else self.output_tokens / self.limit_seconds


@dataclass(frozen=True)
class Contender:
    """An engine to compare, and options of its own on top of those all are given."""

    label: str
    engine: str
    options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(label: str) -> Contender:
        """From "name", or "ours:preset".

        Raises:
            ValueError: there is no such engine or preset.
        """
        engine, _, preset = label.partition(":")
        if engine not in ENGINES or (preset and engine != Ours.name):
            problem = "only ours has presets" if engine in ENGINES else "unknown engine"
            raise ValueError(f"{label!r}: {problem}. {did_you_mean(engine, ENGINES)}")
        if preset and preset not in PRESETS:
            raise ValueError(f"{label!r}: unknown preset. {did_you_mean(preset, PRESETS)}")
        return Contender(label, engine, {"preset": preset} if preset else {})


@dataclass
class Measured:
    """What one engine did, by the names of the workloads.

    Attributes:
        outputs: of the warm-ups.
        latencies: of the requests of every repeat, if the engine tells.
        problem: why there are no rates, if there are none.
        watch_problem: why steps of some workloads were not watched, if that failed. The rates
            were measured before and count all the same.
    """

    contender: Contender
    startup_seconds: float = 0.0
    construct_seconds: float = 0.0
    warmups: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Tokens] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    latencies: dict[str, list[list[Latency]]] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)
    problem: str | None = None
    watch_problem: str | None = None

    @property
    def engine(self) -> str:
        return self.contender.label


def measure_engines(
    contenders: Iterable[Contender],
    setting: Setting,
    works: list[Workload],
    repeats: int,
    *,
    check: Workload | None = None,
    watch: bool = False,
) -> Iterator[list[Measured]]:
    """Run the workloads on engines, each in a process of its own.

    On a CPU the engines take turns, repeat by repeat. On CUDA each has the device to itself, and
    what the caller does between two of them may use it.

    Args:
        check: a workload to run first, for its outputs alone.
        watch: run all once more, with their steps watched.

    Returns:
        An iterator of those that have ended together: on CUDA one after the other.
    """
    found = [Measured(contender) for contender in contenders]
    groups = [[one] for one in found] if setting.device == "cuda" else [found]
    for group in groups:
        _measure_group(group, setting, works, repeats, check, watch)
        yield group


def _measure_group(
    group: list[Measured],
    setting: Setting,
    works: list[Workload],
    repeats: int,
    check: Workload | None,
    watch: bool,
) -> None:
    device = _DeviceMemory(setting.device)
    with ExitStack() as stack:
        engines: list[tuple[Measured, EngineProcess]] = []
        for one in group:
            try:
                own = replace(setting, options={**setting.options, **one.contender.options})
                engine = stack.enter_context(EngineProcess(one.contender.engine, own))
            except EngineFailedError as error:
                one.problem = str(error)
                continue
            one.startup_seconds = engine.startup_seconds
            one.construct_seconds = engine.construct_seconds
            engines.append((one, engine))
        if check is not None:
            for one, engine in engines:
                if ran := _run(one, engine, check, 0):
                    one.outputs[check.name] = ran.outputs
        for work in works:
            for i in range(repeats + 1):
                for one, engine in engines:
                    if ran := _run(one, engine, work, i):
                        _note(one, work, i, ran)
                        one.peak_bytes[work.name] = device.held() or ran.peak_host_bytes
        for work in works if watch else []:
            for one, engine in engines:
                _watch(one, engine, work)


def _run(one: Measured, engine: EngineProcess, work: Workload, repeat: int) -> Ran | None:
    """One run, unless the engine has failed before; outputs of wrong lengths are a failure."""
    if one.problem is not None:
        return None
    try:
        ran = engine.run(work.rotated(repeat))
    except EngineFailedError as error:
        one.problem = str(error)
        return None
    short = ENGINES[one.contender.engine].unreturned
    if [len(out) + short for out in ran.outputs] != work.lengths:
        one.problem = f"wrong outputs, so no rate: wrong lengths in {work.name!r}"
        return None
    return ran


def _note(one: Measured, work: Workload, repeat: int, ran: Ran) -> None:
    if repeat:
        one.seconds.setdefault(work.name, []).append(ran.seconds)
        if ran.latencies:
            one.latencies.setdefault(work.name, []).append(ran.latencies)
    else:
        one.warmups[work.name] = ran.seconds
        one.outputs[work.name] = ran.outputs


def _watch(one: Measured, engine: EngineProcess, work: Workload) -> None:
    if one.problem is None and one.watch_problem is None:
        try:
            if trace := engine.watch(work):
                one.traces[work.name] = trace
        except EngineFailedError as error:
            one.watch_problem = f"{work.name}: {error}"


class _DeviceMemory:
    """Memory of the CUDA device taken since now, by whatever process; 0 elsewhere."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._before = self._free()

    def held(self) -> int:
        return self._before - self._free()

    def _free(self) -> int:
        return torch.cuda.mem_get_info()[0] if self._cuda else 0


def judge(found: list[Measured], works: list[Workload], reference: Reference) -> None:
    """Compare the greedy outputs of `checked` workloads; a wrong one is the engine's problem."""
    for one in found:
        for work in works:
            if not work.checked or one.problem is not None:
                continue
            try:
                one.agreements[work.name] = reference.judge(work, one.outputs[work.name])
            except WrongOutputError as error:
                one.problem = str(error)


def rows_of(
    found: list[Measured],
    works: list[Workload],
    limit: Callable[[Contender, Workload], float] | None,
    baseline: str | None,
) -> list[Row]:
    """The figures of the engines without a problem, workload by workload.

    Args:
        limit: seconds of the roofline, if it is known.
        baseline: the engine that speed-ups are over.
    """
    good = {one.engine: one for one in found if one.problem is None}
    base = good.get(baseline or "")
    rows = []
    for work in works:
        for name, one in good.items():
            seconds = one.seconds[work.name]
            speedups = None
            if base is not None and base is not one:
                pairs = zip(base.seconds[work.name], seconds, strict=True)
                speedups = sorted(theirs / own for theirs, own in pairs)
            rows.append(
                Row(
                    work.name,
                    name,
                    work.num_output_tokens,
                    seconds,
                    warmup_seconds=one.warmups[work.name],
                    limit_seconds=limit(one.contender, work) if limit else None,
                    baseline=baseline if speedups else None,
                    speedups=speedups,
                    peak_bytes=one.peak_bytes[work.name],
                    agreement=one.agreements.get(work.name)
                    or next(iter(one.agreements.values()), None),
                    latencies=by_group(work.groups, one.latencies.get(work.name, [])),
                )
            )
    return rows


def figures_of(
    about: dict[str, str], found: Sequence[Measured], rows: Sequence[Row]
) -> dict[str, Any]:
    """All of a comparison but outputs and traces, as plain data."""
    engines = [
        {
            "engine": one.engine,
            "startup_seconds": one.startup_seconds,
            "construct_seconds": one.construct_seconds,
            "problem": one.problem,
            "watch_problem": one.watch_problem,
        }
        for one in found
    ]
    return {"environment": about, "engines": engines, "rows": [asdict(row) for row in rows]}
