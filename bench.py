"""Throughput and latency, outputs checked against transformers before any rate is printed.

    python bench.py                           CPU: beside transformers; CUDA: seeds and latency
    python bench.py --workload seeds latency ttft startup --shape qwen3-0.6b
    python bench.py --shape qwen3-8b --tensor-parallel 1 2 4 --workload seeds128 latency
    python bench.py --engine ours,transformers,vllm,nano-vllm,mini-sglang --report folder
    python bench.py --engine sequential,transformers,ours    speed-ups over no cache, no batch
    python bench.py --engine ours,ours:throughput            presets side by side
    python bench.py --profile folder          time by phase and by kernel, and torch's trace
    nsys profile python bench.py --nvtx       the phases as ranges for nsys, on CUDA
    python bench.py --model path              a checkpoint of yours
    python bench.py --json results.json       all figures of every repeat as well

compare   one request, and 32 of mixed length
small     8 requests of 16 to 64 tokens in and out
seeds     256 requests of 100 to 1,024 tokens in and out, temperature 0.6
seeds128  the first 128 of them
latency   1, 8 and 64 requests of 128 tokens in and 512 out
ttft      time to the first token after 128, 1,024 and 3,800 tokens
crowd     16 requests that run while 32 prompts of 1,500 tokens are computed
flood     1,024 requests of 16 to 64 tokens in and out
startup   construction to ready in a new process, with a cold and a warm kernel cache
kernels   attention and the linears alone, against the machine's limits; CUDA
overlap   what the host does for a decode step of 256 requests while the device works; CUDA
scheduler schedule and commit alone, for 256 running and up to 100,000 waiting requests; no model

Every engine runs in a process of its own. On a CPU they take turns, on CUDA each has the device
to itself; there the run also measures the machine's read bandwidth and matmul rate and prints the
fraction of the workload's roofline that was reached (utils/roofline.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from config import Config
from utils.bench.compare import Contender, figures_of, judge, measure_engines, rows_of
from utils.bench.engines import ENGINES, Setting
from utils.bench.environment import environment
from utils.bench.limits import Limits
from utils.bench.profile import Profile, profile, tables
from utils.bench.reference import Reference
from utils.bench.startup import startup_seconds
from utils.bench.words import (
    describe_ceilings,
    describe_engine,
    describe_kernel,
    describe_overlap,
    describe_row,
    describe_startup,
)
from utils.bench.workloads import NAMES, check_workload, works_for
from utils.checkpoint import Checkpoint, open_checkpoint, resolve
from utils.kernel_speed import KernelTime, measure_kernels
from utils.overlap import draw, measure_overlap
from utils.random_weights import SHAPES, make_checkpoint
from utils.roofline import measure_ceilings
from utils.scheduling_cost import measure_scheduling

DEFAULT_MODEL = Path(__file__).parent / "assets" / "qwen3-tiny-python"
# Workloads of this engine's parts, which need no comparison.
ALONE = ("startup", "kernels", "overlap", "scheduler")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", nargs="+", choices=(*NAMES, *ALONE))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--engine", type=contenders, help=f"some of {','.join(ENGINES)}")
    which.add_argument(
        "--tensor-parallel", nargs="+", type=int, help="numbers of devices to compare, e.g. 1 2 4"
    )
    parser.add_argument("--model", type=Path, help="checkpoint folder")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-bytes", type=int, help="KV cache of engines that take its size")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs after a warm-up")
    parser.add_argument("--threads", type=int, help="torch threads (CPU)")
    parser.add_argument("--timeline", type=Path, help="draw the steps of `overlap` here, as SVG")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--profile", type=Path, help="profile the first workload into this folder")
    how.add_argument("--nvtx", action="store_true", help="run the first workload for nsys")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--report", type=Path, help="write a page with plots into this folder")
    return parser.parse_args()


def contenders(text: str) -> list[Contender]:
    """The engines named in a comma-separated list."""
    try:
        return [Contender.parse(label) for label in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def installed(wanted: list[Contender]) -> list[Contender]:
    """Those that can run here; the others are named.

    Raises:
        SystemExit: none can.
    """
    there = []
    for one in wanted:
        if module := ENGINES[one.engine].missing():
            print(f"{one.label}: not installed, left out (there is no package {module!r})")
        else:
            there.append(one)
    if not there:
        sys.exit("none of the engines is installed")
    return there


def setting_of(args: argparse.Namespace, checkpoint: Checkpoint) -> Setting:
    """What all engines are given, with "auto" resolved as this engine does."""
    config = resolve(Config.from_options(checkpoint.path, dtype=args.dtype), checkpoint)
    assert config.max_model_len is not None
    return Setting(
        model=str(checkpoint.path.resolve()),
        dtype=config.dtype,
        device=config.device,
        max_model_len=config.max_model_len,
        kv_bytes=args.kv_bytes,
        threads=args.threads,
    )


def compare(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Measure, judge and print the engines; returns all figures."""
    checkpoint = open_checkpoint(str(path))
    setting = setting_of(args, checkpoint)
    cuda = setting.device == "cuda"
    engines = installed(wanted(args, cuda))
    about = environment(setting)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    vocab_size = int(checkpoint.hf_config.vocab_size)
    names = args.workload or default_workloads(engines, cuda)
    works = [work for name in names for work in works_for(name, vocab_size)]
    check = None if all(work.checked for work in works) else check_workload(vocab_size)
    limits = Limits(setting) if cuda else None
    if limits:
        print(describe_ceilings(limits.ceilings), flush=True)
    found = measure_engines(
        engines, setting, works, args.repeats, check=check, watch=args.report is not None
    )
    judge(found, [*works, *([check] if check else [])], Reference(setting))
    rows = rows_of(found, works, limits.seconds if limits else None, baseline_of(args, engines))
    for one in found:
        print(describe_engine(one))
    for row in rows:
        print(describe_row(row), flush=True)
    if args.report:
        from utils.bench.report import write_report

        write_report(args.report, about, found, rows)
        print(f"report: {args.report / 'README.md'}")
    return figures_of(about, found, rows)


def profile_ours(args: argparse.Namespace, path: Path) -> Profile:
    """Profile this engine on the first workload, and print where the time went."""
    if args.nvtx and not torch.cuda.is_available():
        sys.exit("--nvtx needs a CUDA device; --profile works without one")
    checkpoint = open_checkpoint(str(path))
    (name, *_) = args.workload or default_workloads([], torch.cuda.is_available())
    work = works_for(name, int(checkpoint.hf_config.vocab_size))[-1]
    found = profile(str(path), work, args.profile, dtype=args.dtype)
    print(tables(found))
    if args.profile:
        (args.profile / "README.md").write_text(f"# Profile\n\n{tables(found)}\n")
    return found


def default_workloads(engines: list[Contender], cuda: bool) -> list[str]:
    """What to run if nothing is said; a sequential engine needs hours for any but the small one."""
    if any(one.engine == "sequential" for one in engines):
        return ["small"]
    return ["seeds", "latency", "ttft"] if cuda else ["compare"]


def wanted(args: argparse.Namespace, cuda: bool) -> list[Contender]:
    """The engines that were asked for."""
    if args.tensor_parallel:
        return [
            Contender(f"{size} devices", "ours", {"tensor_parallel_size": size})
            for size in args.tensor_parallel
        ]
    return args.engine or contenders("ours" if cuda else "ours,transformers")


def baseline_of(args: argparse.Namespace, engines: list[Contender]) -> str | None:
    """The engine that speed-ups are over: the slowest kind there is."""
    names = [one.label for one in engines]
    if args.tensor_parallel or len({one.engine for one in engines}) == 1:
        return names[0]
    return next((name for name in ("sequential", "transformers") if name in names), None)


def kernels(shape: str, repeats: int) -> list[KernelTime]:
    """Measure and print the kernels of a named shape."""
    ceilings = measure_ceilings(torch.device("cuda"))
    print(describe_ceilings(ceilings))
    times = measure_kernels(SHAPES[shape], ceilings, repeats)
    for time_ in times:
        print(f"{shape} {describe_kernel(time_)}")
    return times


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {}
    alone = [name for name in ALONE if name in (args.workload or ())]
    if args.workload:
        args.workload = [name for name in args.workload if name not in alone]
    if "scheduler" in alone:
        figures["scheduler"] = [asdict(c) for c in measure_scheduling(300 * args.repeats)]
    if "kernels" in alone:
        times = kernels(args.shape or "qwen3-0.6b", args.repeats)
        figures["kernels"] = [asdict(time_) for time_ in times]
    with tempfile.TemporaryDirectory() as scratch:
        path = args.model or DEFAULT_MODEL
        if args.shape:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            path = make_checkpoint(args.shape, Path(scratch), device)
        if args.profile or args.nvtx:
            figures["profile"] = asdict(profile_ours(args, path))
        elif args.workload != []:
            figures |= compare(args, path)
        if "startup" in alone:
            figures["startup"] = startup_seconds(path, min(args.repeats, 3))
            print(describe_startup(figures["startup"]))
        if "overlap" in alone:
            found = measure_overlap(path)
            print(describe_overlap(found))
            if args.timeline:
                draw(found, args.timeline)
            figures["overlap"] = asdict(found)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    if failed := [one["engine"] for one in figures.get("engines", []) if one["problem"]]:
        sys.exit(f"no rates of {', '.join(failed)}")


if __name__ == "__main__":
    main()
