"""A comparison from start to end, each engine's figures told as soon as they are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.compare import Contender, Measured, Row, judge, measure_engines, rows_of
from benchmarks.engines import ENGINES, Setting
from benchmarks.environment import environment
from benchmarks.exact import measure_exact, promise
from benchmarks.exact_quality import measure_quality
from benchmarks.limits import Limits
from benchmarks.reference import Reference, WrongOutputError
from benchmarks.variants import VARIANTS
from benchmarks.words import (
    describe_engine,
    describe_kept,
    describe_latency,
    describe_promise,
    describe_quality,
    describe_row,
    describe_variants,
)
from benchmarks.workloads import Workload
from config import Config
from engine.parts import resolve
from memory.sizing import release_device
from utils.checkpoint import Checkpoint

Tell = Callable[[str], None]


def setting_of(
    checkpoint: Checkpoint, dtype: str = "auto", kv_bytes: int | None = None, threads: int = 0
) -> Setting:
    """What all engines are given, with "auto" resolved as this engine does."""
    config = resolve(Config.from_options(checkpoint.path, dtype=dtype), checkpoint)
    assert config.max_model_len is not None
    return Setting(
        model=str(checkpoint.path.resolve()),
        dtype=config.dtype,
        device=config.device,
        max_model_len=config.max_model_len,
        kv_bytes=kv_bytes,
        threads=threads or None,
    )


def installed(wanted: Sequence[Contender], tell: Tell) -> list[Contender]:
    """Those that can run here; the others are named."""
    there = []
    for one in wanted:
        if module := ENGINES[one.engine].missing():
            tell(f"{one.label}: not installed, left out (there is no package {module!r})")
        else:
            there.append(one)
    return there


def fitting(works: Sequence[Workload], max_model_len: int, tell: Tell) -> list[Workload]:
    """Those whose requests all fit the context window; the others are named.

    One that is too long would be an engine's failure, and cost it the rates of the others.
    """
    for work in works:
        if work.longest > max_model_len:
            tell(
                f"{work.name}: left out, a request comes to {work.longest:,} tokens and the "
                f"context window holds {max_model_len:,}"
            )
    return [work for work in works if work.longest <= max_model_len]


def run_comparison(
    engines: Sequence[Contender],
    setting: Setting,
    works: list[Workload],
    repeats: int,
    tell: Tell,
    *,
    check: Workload | None = None,
    baseline: str | None = None,
    limits: Limits | None = None,
    watch: bool = False,
) -> tuple[list[Measured], list[Row]]:
    """Measure the engines; judge each one's outputs and tell its figures when it has ended.

    Args:
        tell: takes a line.
        check, watch: as of `measure_engines`.
        baseline: the engine that speed-ups are over. Those of engines that ended before it are
            told at the end, where all are put side by side.
    """
    limit = limits.seconds if limits else None
    found: list[Measured] = []
    num_groups = 0
    for group in measure_engines(engines, setting, works, repeats, check=check, watch=watch):
        num_groups += 1
        judge_group(group, [*works, *([check] if check else [])], setting)
        found += group
        for one in group:
            tell(describe_engine(one))
        labels = {one.engine for one in group}
        rows = rows_of(found, works, limit, baseline)
        _tell_rows([row for row in rows if row.engine in labels], tell)
    rows = rows_of(found, works, limit, baseline)
    if num_groups > 1:
        tell("side by side:")
        _tell_rows(rows, tell)
    return found, rows


def run_variants(
    name: str, setting: Setting, vocab_size: int, repeats: int, tell: Tell
) -> dict[str, Any]:
    """Measure and tell the variants of a workload, by its --workload name; returns all figures.

    Raises:
        WrongOutputError: nothing but the environment was told.
    """
    about = environment(setting)
    tell(", ".join(f"{name} {value}" for name, value in about.items()))
    make, measure = VARIANTS[name]
    found = measure(setting, make(setting.device, vocab_size), repeats)
    for line in describe_variants(found):
        tell(line)
    return {"environment": about, **asdict(found)}


def run_exact(
    setting: Setting, num_requests: int, num_tokens: int, tell: Tell, figures: dict[str, Any]
) -> None:
    """Tell what requests keep in company and how far logits are from float32, each when known.

    All figures are in `figures`, also if an error is raised.

    Raises:
        WrongOutputError: a request has lost what was promised, or the logits are too far.
    """
    promised = promise(setting.device)
    about = environment(setting)
    tell(", ".join(f"{name} {value}" for name, value in about.items()))
    tell(describe_promise(promised))
    settings: list[dict[str, Any]] = []
    figures |= {"environment": about, "promised": promised, "settings": settings}
    problems = []
    for kept in measure_exact(setting, num_requests):
        tell(describe_kept(kept))
        settings.append(asdict(kept))
        problems.append(kept.failure(promised))
    quality = measure_quality(setting, num_tokens)
    # The engines of a next run measure how much memory is free.
    release_device(torch.device(setting.device))
    tell(describe_quality(setting.dtype, quality))
    figures["quality"] = asdict(quality)
    if failures := [*filter(None, problems), *quality.failures()]:
        raise WrongOutputError("\n  ".join(["not exact", *failures]))


def judge_group(group: list[Measured], works: list[Workload], setting: Setting) -> None:
    """Compare the greedy outputs of `checked` workloads with transformers, for now on the device.

    The next engine needs its memory, so that the reference is loaded anew each time.
    """
    if any(one.problem is None for one in group):
        judge(group, works, Reference(setting))
        release_device(torch.device(setting.device))


def _tell_rows(rows: Sequence[Row], tell: Tell) -> None:
    for row in rows:
        tell(describe_row(row))
        for group in row.latencies:
            tell(describe_latency(row, group))
