"""Throughput and latency, outputs checked against transformers before any rate is printed.

    python bench.py                           CPU: beside transformers; CUDA: seeds and latency
    python bench.py --workload seeds latency ttft startup --shape qwen3-0.6b
    python bench.py --shape qwen3-8b --tensor-parallel 1 2 4 --workload seeds128 latency
    python bench.py --engine ours,transformers,vllm,nano-vllm,mini-sglang --report folder
    python bench.py --engine sequential,transformers,ours    speed-ups over no cache, no batch
    python bench.py --engine ours,ours:throughput            presets side by side
    python bench.py --engine ours,ours:low_latency --workload crowd
    python bench.py --workload filters text --shape qwen3-0.6b
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
crowd     16 requests that run while 32 prompts of 1,500 tokens are computed, and how long both
          kinds wait for their first token and between two
flood     1,024 requests of 16 to 64 tokens in and out
filters   what a decode step costs with top_k, top_p, min_p, a penalty, log-probabilities: 256
          requests (8 on a CPU) of 128 tokens in and 256 out, the variants in turn
text      what text costs, and looking for a stop string, against tokens alone: the seeds (8 of
          them on a CPU), the variants in turn; --shape gets a tokenizer of its vocabulary's size
startup   construction to ready in a new process, with a cold and a warm kernel cache
kernels   attention and the linears alone, against the machine's limits; CUDA
overlap   what the host does for a decode step of 256 requests while the device works; CUDA
scheduler schedule and commit alone, for 256 running and up to 100,000 waiting requests; no model

Every engine runs in a process of its own. On a CPU they take turns; on CUDA each has the device
to itself, and its rates are printed before the next one starts. There the run also measures the
machine's read bandwidth and matmul rate and prints the fraction of the workload's roofline that
was reached (utils/roofline.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils.bench.compare import Contender, figures_of
from utils.bench.engines import ENGINES
from utils.bench.environment import environment
from utils.bench.limits import Limits
from utils.bench.profile import Profile, profile, tables
from utils.bench.reference import WrongOutputError
from utils.bench.run import installed, run_comparison, run_variants, setting_of
from utils.bench.startup import startup_seconds
from utils.bench.variants import VARIANTS
from utils.bench.words import (
    describe_ceilings,
    describe_kernel,
    describe_overlap,
    describe_startup,
)
from utils.bench.workloads import NAMES, check_workload, works_for
from utils.checkpoint import Checkpoint, open_checkpoint
from utils.kernel_speed import KernelTime, measure_kernels
from utils.overlap import draw, measure_overlap
from utils.random_weights import SHAPES, make_checkpoint
from utils.roofline import measure_ceilings
from utils.scheduling_cost import measure_scheduling

DEFAULT_MODEL = Path(__file__).parent / "assets" / "qwen3-tiny-python"
# Workloads of this engine's parts, which need no comparison.
ALONE = (*VARIANTS, "startup", "kernels", "overlap", "scheduler")


# Line by line, so that a run cut off has told what it measured.
tell = partial(print, flush=True)


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


def compare(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Measure, judge and print the engines; returns all figures.

    Raises:
        SystemExit: none of the engines is installed.
    """
    setting = setting_of(checkpoint, args.dtype, args.kv_bytes, args.threads)
    cuda = setting.device == "cuda"
    engines = installed(wanted(args, cuda), tell)
    if not engines:
        sys.exit("none of the engines is installed")
    about = environment(setting)
    tell(", ".join(f"{name} {value}" for name, value in about.items()))
    vocab_size = int(checkpoint.hf_config.vocab_size)
    names = args.workload or default_workloads(engines, cuda)
    works = [work for name in names for work in works_for(name, vocab_size)]
    limits = Limits(setting) if cuda else None
    if limits:
        tell(describe_ceilings(limits.ceilings))
    found, rows = run_comparison(
        engines,
        setting,
        works,
        args.repeats,
        tell,
        check=None if all(work.checked for work in works) else check_workload(vocab_size),
        baseline=baseline_of(args, engines),
        limits=limits,
        watch=args.report is not None,
    )
    if args.report:
        from utils.bench.report import write_report

        write_report(args.report, about, found, rows)
        tell(f"report: {args.report / 'README.md'}")
    return figures_of(about, found, rows)


def variants(args: argparse.Namespace, checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Measure and print the workload `filters` or `text`; returns all figures.

    Raises:
        SystemExit: the outputs are wrong.
    """
    setting = setting_of(checkpoint, args.dtype, args.kv_bytes, args.threads)
    vocab_size = int(checkpoint.hf_config.vocab_size)
    try:
        return run_variants(name, setting, vocab_size, args.repeats, tell)
    except WrongOutputError as error:
        sys.exit(f"{name}: {error}")


def profile_ours(args: argparse.Namespace, checkpoint: Checkpoint) -> Profile:
    """Profile this engine on the first workload, and print where the time went."""
    if args.nvtx and not torch.cuda.is_available():
        sys.exit("--nvtx needs a CUDA device; --profile works without one")
    (name, *_) = args.workload or default_workloads([], torch.cuda.is_available())
    work = works_for(name, int(checkpoint.hf_config.vocab_size))[-1]
    found = profile(str(checkpoint.path), work, args.profile, dtype=args.dtype)
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
        checkpoint = open_checkpoint(str(path))
        if args.profile or args.nvtx:
            figures["profile"] = asdict(profile_ours(args, checkpoint))
        elif args.workload != []:
            figures |= compare(args, checkpoint)
        for name in VARIANTS:
            if name in alone:
                figures[name] = variants(args, checkpoint, name)
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
