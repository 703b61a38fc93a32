"""The command line of bench.py: what is wrong with it is told before anything runs."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.compare import Contender
from benchmarks.engines import ENGINES, Ours
from benchmarks.random_weights import SHAPES
from benchmarks.reference import TOLERANCE
from benchmarks.variants import VARIANTS
from benchmarks.workloads import NAMES
from config import Config
from utils.errors import ConfigError

# Workloads of this engine's parts, which need no comparison.
ALONE = (*VARIANTS, "startup", "kernels", "overlap", "scheduler", "exact")
_NEED_CUDA = ("kernels", "overlap")
# Stands for --profile and --nvtx, which run a workload in a way of their own.
_PROFILE = "a profile"
_WITH_A_MODEL = (*NAMES, *VARIANTS, "startup", "overlap", "exact", _PROFILE)
# The workloads that each option changes; for the others it would be dropped without a word.
_CHANGES: dict[str, tuple[str, ...]] = {
    "engine": (*NAMES, _PROFILE),
    "tensor_parallel": (*NAMES, "exact"),
    "model": _WITH_A_MODEL,
    "shape": (*_WITH_A_MODEL, "kernels"),
    "dtype": _WITH_A_MODEL,
    "kv_bytes": _WITH_A_MODEL,
    "threads": (*NAMES, *VARIANTS, "exact", _PROFILE),
    "repeats": (*NAMES, *VARIANTS, "startup", "kernels", "scheduler"),
    "requests": ("exact",),
    "tokens": ("exact",),
}


def parse_args(
    description: str | None, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options, defaults filled in; also `engines`, the contenders, and `profiled`.

    Folders to write into are made.

    Raises:
        SystemExit: an option has a bad value, or would be without effect.
    """
    parser = _parser(description)
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    args.profiled = args.profile is not None or args.nvtx
    args.engines = args.engine or _engines(args.tensor_parallel, cuda or args.profiled)
    if args.profiled:
        _check_profile(parser, args, cuda)
    args.workload = args.workload or _workloads(args.engines, cuda)[: 1 if args.profiled else None]
    _check_workloads(parser, args.workload, cuda)
    _check_changes(parser, args)
    _check_outputs(parser, args)
    args.dtype = args.dtype or "auto"
    args.repeats = args.repeats or 7
    # A CPU would need minutes for the requests of a GPU.
    args.requests = args.requests or (64 if cuda else 8)
    args.tokens = args.tokens or 20_000
    return args


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workload", nargs="+", choices=(*NAMES, *ALONE))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--engine", type=contenders, help=f"some of {','.join(ENGINES)}")
    which.add_argument(
        "--tensor-parallel", nargs="+", type=_ranks, help="numbers of devices to compare: 1 2 4"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, help="checkpoint folder")
    model.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    add("--dtype", choices=("auto", *TOLERANCE), help="auto: the checkpoint's, float32 on a CPU")
    add("--kv-bytes", type=_positive, help="KV cache of engines that take its size")
    add("--repeats", type=_positive, help="timed runs after a warm-up (7), of startup at most 3")
    add("--threads", type=_positive, help="torch threads (CPU)")
    add("--requests", type=_positive, help="requests of `exact` (64, on a CPU 8)")
    add("--tokens", type=_positive, help="tokens compared with float32 by `exact` (20,000)")
    add("--timeline", type=Path, help="draw the steps of `overlap` here, as SVG")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--profile", type=Path, help="profile a workload of ours into this folder")
    how.add_argument("--nvtx", action="store_true", help="run a workload of ours for nsys")
    add("--json", type=Path, help="write all figures here")
    add("--report", type=Path, help="write a page with plots into this folder; needs matplotlib")
    return parser


def contenders(text: str) -> list[Contender]:
    """The engines named in a comma-separated list."""
    labels = text.split(",")
    try:
        _once(labels)
        return [Contender.parse(label) for label in labels]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _once(names: Sequence[object]) -> None:
    """Figures go by names, so that none may come twice."""
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"{twice[0]} is there twice")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


_positive.__name__ = "positive int"


def _ranks(text: str) -> int:
    try:
        return Config(model="any", tensor_parallel_size=_positive(text)).tensor_parallel_size
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _engines(sizes: Sequence[int] | None, alone: bool) -> list[Contender]:
    """Without --engine."""
    if sizes:
        return [Contender(f"{n} devices", Ours.name, {"tensor_parallel_size": n}) for n in sizes]
    return contenders("ours" if alone else "ours,transformers")


def _workloads(engines: Sequence[Contender], cuda: bool) -> list[str]:
    """Without --workload; a sequential engine needs hours for any but the small one."""
    if any(one.engine == "sequential" for one in engines):
        return ["small"]
    return ["seeds", "latency"] if cuda else ["compare"]


def _check_profile(parser: argparse.ArgumentParser, args: argparse.Namespace, cuda: bool) -> None:
    if args.nvtx and not cuda:
        parser.error("argument --nvtx: needs a CUDA device; --profile works without one")
    option = "--nvtx" if args.nvtx else "--profile"
    if args.workload and (len(args.workload) > 1 or args.workload[0] not in NAMES):
        parser.error(f"argument --workload: {option} takes one of {', '.join(NAMES)}")
    if args.engine and [one.engine for one in args.engine] != [Ours.name]:
        parser.error(f"argument --engine: {option} is of ours alone")


def _check_workloads(parser: argparse.ArgumentParser, names: Sequence[str], cuda: bool) -> None:
    try:
        _once(names)
    except ValueError as error:
        parser.error(f"argument --workload: {error}")
    for name in _NEED_CUDA:
        if name in names and not cuda:
            parser.error(f"argument --workload: {name} needs a CUDA device")


def _check_changes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    asked = [_PROFILE] if args.profiled else args.workload
    for name, changed in _CHANGES.items():
        same = [one for one in asked if one not in changed]
        if getattr(args, name) is not None and same:
            option = "--" + name.replace("_", "-")
            parser.error(f"argument {option}: would be without effect on {', '.join(same)}")


def _check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """A run takes minutes: what it found must not be lost to a folder that is not there."""
    if args.timeline and (args.profiled or "overlap" not in args.workload):
        parser.error("argument --timeline: draws the steps of --workload overlap")
    if args.report and (args.profiled or not set(NAMES) & set(args.workload)):
        parser.error("argument --report: is of a comparison, and none was asked for")
    if args.report and importlib.util.find_spec("matplotlib") is None:
        parser.error("argument --report: its plots need matplotlib: pip install matplotlib")
    folders = {"--report": args.report, "--profile": args.profile}
    files = {"--json": args.json, "--timeline": args.timeline}
    for option, path in (folders | files).items():
        if path is None:
            continue
        folder = path if option in folders else path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument {option}: {error}")
        if not os.access(folder, os.W_OK) or (option in files and path.is_dir()):
            parser.error(f"argument {option}: {path} cannot be written")
