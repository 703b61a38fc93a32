"""What bench.py does: the parts that its command line asks for, one after the other."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import Contender, figures_of
from benchmarks.engines import Setting
from benchmarks.environment import environment
from benchmarks.kernel_speed import measure_kernels
from benchmarks.limits import Limits
from benchmarks.options import parse_args
from benchmarks.overlap import draw, measure_overlap
from benchmarks.processes import EngineFailedError
from benchmarks.profile import profile, tables
from benchmarks.random_weights import SHAPES, make_checkpoint
from benchmarks.reference import WrongOutputError
from benchmarks.report import write_report
from benchmarks.roofline import measure_ceilings
from benchmarks.run import (
    fitting,
    installed,
    run_comparison,
    run_exact,
    run_variants,
    setting_of,
)
from benchmarks.scheduling_cost import measure_scheduling
from benchmarks.startup import startup_seconds
from benchmarks.variants import VARIANTS
from benchmarks.words import (
    describe_ceilings,
    describe_kernel,
    describe_overlap,
    describe_startup,
)
from benchmarks.workloads import NAMES, Workload, check_workload, works_of
from utils.checkpoint import Checkpoint, open_checkpoint
from utils.errors import AllmosError

DEFAULT_MODEL = Path(__file__).parents[1] / "assets" / "qwen3-tiny-python"

# Of what was measured, by name; a part adds its own as soon as it has them.
Figures = dict[str, Any]
Part = Callable[[Figures], None]

# Line by line, so that a run cut off has told what it measured.
tell = partial(print, flush=True)


def run(description: str | None) -> None:
    """Run what the command line asks for.

    Args:
        description: the text of --help.

    Raises:
        SystemExit: nothing could be run, or a part failed.
    """
    args = parse_args(description)
    if args.threads:
        torch.set_num_threads(args.threads)
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            parts = parts_of(args, Path(scratch))
        except AllmosError as error:
            sys.exit(str(error))
        problems = run_parts(parts, figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    if problems:
        sys.exit("\n".join(problems))


def parts_of(args: argparse.Namespace, scratch: Path) -> dict[str, Part]:
    """What was asked for, by name and in the order to run it; what cannot run is told here.

    Raises:
        AllmosError: the model cannot be used.
        SystemExit: none of the engines, or of the workloads, is left.
    """
    parts: dict[str, Part] = {}
    if "scheduler" in args.workload:
        parts["scheduler"] = partial(scheduler, args)
    if "kernels" in args.workload:
        parts["kernels"] = partial(kernels, args)
    if len(parts) == len(args.workload):
        return parts
    checkpoint = checkpoint_of(args, scratch)
    setting = setting_of(checkpoint, args.dtype, args.kv_bytes, args.threads)
    vocab_size = int(checkpoint.hf_config.vocab_size)
    if args.profiled:
        return {"profile": partial(profile_ours, args, setting, vocab_size)}
    if set(NAMES) & set(args.workload):
        parts["comparison"] = comparison(args, setting, vocab_size)
    for name in VARIANTS:
        if name in args.workload:
            parts[name] = partial(variants, args, setting, vocab_size, name)
    if "startup" in args.workload:
        parts["startup"] = partial(startup, args, setting)
    if "overlap" in args.workload:
        parts["overlap"] = partial(overlap, args, setting)
    if "exact" in args.workload:
        for ranks in args.tensor_parallel or [1]:
            parts[f"exact, {ranks} devices" if ranks > 1 else "exact"] = partial(
                exact, args, replace(setting, options={"tensor_parallel_size": ranks})
            )
    return parts


def checkpoint_of(args: argparse.Namespace, scratch: Path) -> Checkpoint:
    """The model to run, opened; random weights are made in `scratch`."""
    if not args.shape:
        return open_checkpoint(str(args.model or DEFAULT_MODEL))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_checkpoint(str(make_checkpoint(args.shape, scratch, device)))


def run_parts(parts: dict[str, Part], figures: Figures) -> list[str]:
    """Run one after the other; returns what went wrong, which costs no other part its figures."""
    problems = {name: problem_of(part, figures) for name, part in parts.items()}
    return [f"{name}: {problem}" for name, problem in problems.items() if problem]


def problem_of(part: Part, figures: Figures) -> str | None:
    """Run a part; what it raised in words, with a traceback if it was not raised on purpose."""
    try:
        part(figures)
    except (AllmosError, WrongOutputError, EngineFailedError) as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def comparison(args: argparse.Namespace, setting: Setting, vocab_size: int) -> Part:
    """The comparison of the engines that are installed on the workloads that fit.

    Raises:
        SystemExit: there are none.
    """
    engines = installed(args.engines, tell)
    if not engines:
        sys.exit("none of the engines is installed")
    names = [name for name in args.workload if name in NAMES]
    works = fitting(works_of(names, vocab_size), setting.max_model_len, tell)
    if not works:
        sys.exit("none of the workloads fits the model's context window")
    return partial(compare, args, setting, vocab_size, engines, works)


def compare(
    args: argparse.Namespace,
    setting: Setting,
    vocab_size: int,
    engines: Sequence[Contender],
    works: list[Workload],
    figures: Figures,
) -> None:
    """Measure, judge and print the engines, and write the report.

    Raises:
        EngineFailedError: some have no rates; the figures of the others are there.
    """
    about = environment(setting)
    tell(", ".join(f"{name} {value}" for name, value in about.items()))
    limits = Limits(setting) if setting.device == "cuda" else None
    if limits:
        tell(describe_ceilings(limits.ceilings))
    checked = all(work.checked for work in works)
    found, rows = run_comparison(
        engines,
        setting,
        works,
        args.repeats,
        tell,
        check=None if checked else check_workload(vocab_size, setting.max_model_len),
        baseline=baseline_of(args, engines),
        limits=limits,
        watch=args.report is not None,
    )
    figures |= figures_of(about, found, rows)
    if args.report:
        write_report(args.report, about, found, rows)
        tell(f"report: {args.report / 'README.md'}")
    if failed := [one.engine for one in found if one.problem]:
        raise EngineFailedError(f"no rates of {', '.join(failed)}")


def variants(
    args: argparse.Namespace, setting: Setting, vocab_size: int, name: str, figures: Figures
) -> None:
    """Measure and print the workload `filters` or `text`."""
    figures[name] = run_variants(name, setting, vocab_size, args.repeats, tell)


def exact(args: argparse.Namespace, setting: Setting, figures: Figures) -> None:
    """Tell which requests keep their bits in company, on as many devices as `setting` says."""
    found = figures.setdefault("exact", {}).setdefault(setting.options["tensor_parallel_size"], {})
    run_exact(setting, args.requests, args.tokens, tell, found)


def profile_ours(
    args: argparse.Namespace, setting: Setting, vocab_size: int, figures: Figures
) -> None:
    """Profile this engine on the workload, of several on the last, and print where time went."""
    work = works_of(args.workload, vocab_size)[-1]
    (contender,) = args.engines
    options = {
        "dtype": setting.dtype,
        "kvcache_memory_bytes": setting.kv_bytes,
        **contender.options,
    }
    found = profile(setting.model, work, args.profile, **options)
    tell(tables(found))
    figures["profile"] = asdict(found)
    if args.profile:
        (args.profile / "README.md").write_text(f"# Profile\n\n{tables(found)}\n")


def baseline_of(args: argparse.Namespace, engines: Sequence[Contender]) -> str | None:
    """The engine that speed-ups are over: the slowest kind there is."""
    names = [one.label for one in engines]
    if args.tensor_parallel or len({one.engine for one in engines}) == 1:
        return names[0]
    return next((name for name in ("sequential", "transformers") if name in names), None)


def scheduler(args: argparse.Namespace, figures: Figures) -> None:
    """Measure and print what planning costs."""
    figures["scheduler"] = [asdict(cost) for cost in measure_scheduling(300 * args.repeats)]


def kernels(args: argparse.Namespace, figures: Figures) -> None:
    """Measure and print the kernels of a named shape."""
    shape = args.shape or "qwen3-0.6b"
    ceilings = measure_ceilings(torch.device("cuda"))
    tell(describe_ceilings(ceilings))
    times = measure_kernels(SHAPES[shape], ceilings, args.repeats)
    for time_ in times:
        tell(f"{shape} {describe_kernel(time_)}")
    figures["kernels"] = [asdict(time_) for time_ in times]


def startup(args: argparse.Namespace, setting: Setting, figures: Figures) -> None:
    """Measure and print how long construction takes."""
    seconds = startup_seconds(
        Path(setting.model),
        min(args.repeats, 3),
        dtype=setting.dtype,
        kvcache_memory_bytes=setting.kv_bytes,
    )
    tell(describe_startup(seconds))
    figures["startup"] = seconds


def overlap(args: argparse.Namespace, setting: Setting, figures: Figures) -> None:
    """Measure, print and draw what host and device do at once."""
    found = measure_overlap(
        Path(setting.model), dtype=setting.dtype, kvcache_memory_bytes=setting.kv_bytes
    )
    tell(describe_overlap(found))
    figures["overlap"] = asdict(found)
    if args.timeline:
        draw(found, args.timeline)
