"""Throughput and latency, outputs checked against transformers before any rate is printed.

    python bench.py                           CPU: beside transformers; CUDA: seeds and latency
    python bench.py --workload seeds latency ttft startup --shape qwen3-0.6b
    python bench.py --shape qwen3-8b --tensor-parallel 1 2 4 --workload seeds128 latency
    python bench.py --model path              a checkpoint of yours
    python bench.py --json results.json       all figures of every repeat as well

compare   one request, and 32 of mixed length, beside transformers' `generate` in turn
seeds     256 requests of 100 to 1,024 tokens in and out, temperature 0.6
seeds128  the first 128 of them
latency   1, 8 and 64 requests of 128 tokens in and 512 out
ttft      time to the first token after 128, 1,024 and 3,800 tokens
startup   construction to ready in a new process, with a cold and a warm kernel cache
kernels   attention and the linears alone, against the machine's limits; CUDA
overlap   what the host does for a decode step of 256 requests while the device works; CUDA
scheduler schedule and commit alone, for 256 running and up to 100,000 waiting requests; no model

On CUDA the run also measures the machine's read bandwidth and matmul rate and prints the
fraction of the workload's roofline that was reached (utils/roofline.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from config import Config
from llm import LLM, SamplingParams
from utils.collective_cost import all_reduce_seconds
from utils.kernel_speed import KernelTime, measure_kernels
from utils.overlap import Overlap, draw, measure_overlap
from utils.random_weights import SHAPES, make_checkpoint
from utils.roofline import Ceilings, ModelCosts, fastest_seconds, measure_ceilings
from utils.scheduling_cost import Cost, measure_scheduling

DEFAULT_MODEL = Path(__file__).parent / "assets" / "qwen3-tiny-python"
# A greedy token may miss the reference's largest logit by rounding, in units of the logits'
# standard deviation. bfloat16 keeps 8 bits: a logit of 4 deviations is off by up to 0.016 from its
# own rounding alone, in both engines, and the layers before add theirs.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


@dataclass(frozen=True)
class Workload:
    """Requests by their prompts, the number of tokens to generate for each, and a temperature."""

    name: str
    prompts: list[list[int]]
    lengths: list[int]
    temperature: float = 0.0

    @property
    def num_output_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Row:
    """One engine on one workload: wall seconds of each repeat, after warm-up.

    `speedups` are against another engine's run right after, repeat by repeat: a slow phase of
    the machine hits both.
    """

    workload: str
    engine: str
    output_tokens: int
    seconds: list[float]
    limit_seconds: float | None = None
    speedups: list[float] | None = None

    @property
    def rates(self) -> list[float]:
        return sorted(self.output_tokens / s for s in self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def seeds_workload(count: int = 256) -> Workload:
    """The workload of the project's founding benchmark notes: 133,966 tokens to generate.

    Args:
        count: take the first requests alone.
    """
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    lengths = [rng.randint(100, 1024) for _ in range(256)]
    return Workload(f"seeds, {count} requests", prompts[:count], lengths[:count], 0.6)


def random_workload(
    name: str, count: int, prompt: tuple[int, int], output: tuple[int, int], vocab_size: int
) -> Workload:
    """Random prompts and output lengths in closed ranges; the same for the same name."""
    rng = random.Random(name)
    prompts = [
        [rng.randrange(vocab_size) for _ in range(rng.randint(*prompt))] for _ in range(count)
    ]
    return Workload(name, prompts, [rng.randint(*output) for _ in range(count)])


def run_ours(llm: LLM, work: Workload) -> list[list[int]]:
    """Tokens of every request, through this engine; no prompt is cached from an earlier run."""
    llm.reset_prefix_cache()
    params = [
        SamplingParams(temperature=work.temperature, max_tokens=n, ignore_eos=True)
        for n in work.lengths
    ]
    outputs = llm.generate(work.prompts, params, use_tqdm=False)
    return [out["token_ids"] for out in outputs]


def run_transformers(model: Any, work: Workload) -> list[list[int]]:
    """Tokens of every request, through one greedy `generate` call on the left-padded batch."""
    width = max(map(len, work.prompts))
    ids = [[0] * (width - len(p)) + p for p in work.prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in work.prompts]
    longest = max(work.lengths)
    out = model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=False,
        min_new_tokens=longest,
        max_new_tokens=longest,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [row[:n] for row, n in zip(out[:, width:].tolist(), work.lengths, strict=True)]


@torch.inference_mode()
def check(model: Any, work: Workload, outputs: list[list[int]]) -> str:
    """Check greedy outputs against the reference's logits after the same tokens.

    Every token must be the reference's most likely one, up to rounding.

    Raises:
        SystemExit: one is not; no rate is printed then.
    """
    tolerance = TOLERANCE[str(model.dtype).removeprefix("torch.")]
    exact = total = 0
    for i, (prompt, output) in enumerate(zip(work.prompts, outputs, strict=True)):
        if len(output) != work.lengths[i]:
            sys.exit(f"request {i} has {len(output)} tokens instead of {work.lengths[i]}")
        ids = torch.tensor([prompt + output[:-1]], device=model.device)
        logits = model(ids, logits_to_keep=len(output)).logits[0].float()
        chosen = logits.gather(1, torch.tensor(output, device=model.device).unsqueeze(1))[:, 0]
        gaps = (logits.amax(1) - chosen) / logits.std(1)
        if gaps.max() > tolerance:
            at = int(gaps.argmax())
            sys.exit(
                f"wrong outputs, so no rate is printed: token {at} of request {i} misses the "
                f"reference's largest logit by {float(gaps[at]):.3g} standard deviations"
            )
        exact += int((gaps == 0).sum())
        total += len(output)
    return f"{exact} of {total} greedy tokens are the reference's own, the rest ties of rounding"


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Wall seconds of a call, and what it returned."""
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def compare(llm: LLM, model: Any, work: Workload, repeats: int) -> list[Row]:
    """Both engines in turn."""
    runs: dict[str, Callable[[], list[list[int]]]] = {
        "allmos_v2": lambda: run_ours(llm, work),
        "transformers": lambda: run_transformers(model, work),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        print(f"{name}: {check(model, work, run())}")
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run)[0])
    ours, theirs = seconds.values()
    speedups = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    first, second = (Row(work.name, name, work.num_output_tokens, s) for name, s in seconds.items())
    return [replace(first, speedups=speedups), second]


def measure(llm: LLM, work: Workload, repeats: int, limit: float | None) -> Row:
    """This engine alone; every output has its length, or no rate is printed."""
    seconds = []
    for i in range(repeats + 1):
        elapsed, outputs = timed(lambda: run_ours(llm, work))
        if [len(out) for out in outputs] != work.lengths:
            sys.exit(f"{work.name}: outputs have wrong lengths, so no rate is printed")
        if i:
            seconds.append(elapsed)
    return Row(work.name, "allmos_v2", work.num_output_tokens, seconds, limit)


def report(rows: list[Row]) -> None:
    """Print one workload's rows."""
    for row in rows:
        rates = row.rates
        line = (
            f"{row.workload:<26}{row.engine:<14}{row.median:>9.1f} tok/s "
            f"({rates[0]:.1f} to {rates[-1]:.1f} in {len(rates)})"
        )
        if row.speedups is not None:
            ratio, low, high = statistics.median(row.speedups), row.speedups[0], row.speedups[-1]
            line += f"  {ratio:.2f} times ({low:.2f} to {high:.2f})"
        if row.limit_seconds is not None:
            limit = row.output_tokens / row.limit_seconds
            line += f"  {row.median / limit:.3f} of the limit {limit:.0f}"
        if row.output_tokens == 1:
            line += f"  {1e3 * statistics.median(row.seconds):.2f} ms"
        print(line, flush=True)


def startup_seconds(model: Path, repeats: int) -> Row:
    """Construction to ready in new processes; the first finds no compiled kernels."""
    code = (
        "import sys, time; from llm import LLM; start = time.perf_counter(); "
        "LLM(sys.argv[1]); print('READY', time.perf_counter() - start)"
    )
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(1 + repeats):
            out = subprocess.run(
                [sys.executable, "-c", code, str(model)],
                cwd=Path(__file__).parent,
                env={**os.environ, "TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=True,
            )
            seconds.append(float(out.stdout.split("READY")[1]))
    warm = statistics.median(seconds[1:])
    print(f"startup: ready after {seconds[0]:.1f} s with a cold kernel cache, {warm:.1f} s warm")
    return Row("startup", "allmos_v2", 0, seconds)


def works_for(name: str, vocab_size: int) -> list[Workload]:
    """The workloads behind a --workload name."""
    if name.startswith("seeds"):
        return [seeds_workload(int(name[5:] or 256))]
    if name == "latency":
        return [
            random_workload(f"{n} x (128, 512)", n, (128, 128), (512, 512), vocab_size)
            for n in (1, 8, 64)
        ]
    if name == "ttft":
        return [
            random_workload(f"first token of {n}", 1, (n, n), (1, 1), vocab_size)
            for n in (128, 1024, 3800)
        ]
    return [
        random_workload("1 x (128, 512)", 1, (128, 128), (512, 512), vocab_size),
        random_workload("32 mixed, 16 to 256", 32, (16, 256), (16, 256), vocab_size),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (
        *("compare", "seeds", "seeds128", "latency", "ttft", "startup"),
        *("kernels", "overlap", "scheduler"),
    )
    parser.add_argument("--workload", nargs="+", choices=names, default=None)
    parser.add_argument("--model", type=Path, default=None, help="checkpoint folder")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--tensor-parallel", nargs="+", type=int, help="numbers of devices to compare, e.g. 1 2 4"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs after a warm-up")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (CPU)")
    parser.add_argument("--timeline", type=Path, help="draw the steps of `overlap` here, as SVG")
    parser.add_argument("--json", type=Path, default=None, help="write all figures here")
    return parser.parse_args()


def describe(llm: LLM, ready: float, ceilings: Ceilings | None) -> None:
    """What ran where."""
    config = llm.config
    device = torch.cuda.get_device_name() if config.device == "cuda" else "CPU"
    print(
        f"{Path(config.model).name}, {config.dtype}, {device}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; ready after {ready:.1f} s"
    )
    if ceilings is not None:
        print(describe_ceilings(ceilings))


def describe_ceilings(ceilings: Ceilings) -> str:
    """The machine's limits in words."""
    return (
        f"ceilings: {ceilings.read_bandwidth / 1e12:.2f} TB/s read, "
        f"{ceilings.matmul_rate / 1e12:.0f} TFLOP/s bf16 matmul"
    )


def kernels(shape: str, repeats: int) -> list[KernelTime]:
    """Measure and print the kernels of a named shape."""
    ceilings = measure_ceilings(torch.device("cuda"))
    print(describe_ceilings(ceilings))
    times = measure_kernels(SHAPES[shape], ceilings, repeats)
    for time_ in times:
        low, high = min(time_.seconds), max(time_.seconds)
        print(
            f"{shape} {time_.name:<36}{1e6 * time_.median:>9.1f} us ({1e6 * low:.1f} to "
            f"{1e6 * high:.1f} in {len(time_.seconds)})  {time_.fraction:.3f} of the limit"
        )
    return times


def overlap(path: Path, timeline: Path | None) -> Overlap:
    """Measure, print and draw what host and device do at once."""
    found = measure_overlap(path)
    phases = ", ".join(f"{name} {1e3 * t:.3f}" for name, t in found.phases.items())
    print(
        f"overlap: {found.num_requests} requests, a decode step every {1e3 * found.period:.3f} ms, "
        f"host work {1e3 * found.host:.3f} ms ({phases})"
    )
    if timeline:
        draw(found, timeline)
    return found


def run(args: argparse.Namespace, path: Path) -> list[Row]:
    """All workloads that need an engine on one checkpoint."""
    cuda = torch.cuda.is_available()
    ceilings = measure_ceilings(torch.device("cuda")) if cuda else None
    start = time.perf_counter()
    # Repeats find nothing of the ones before.
    llm = LLM(path, dtype=args.dtype, enable_prefix_caching=False)
    describe(llm, time.perf_counter() - start, ceilings)
    dtype = getattr(torch, llm.config.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    model = model.to(llm.config.device)
    vocab_size = int(model.config.vocab_size)
    names = args.workload or (["seeds", "latency", "ttft"] if cuda else ["compare"])
    rows: list[Row] = []
    if names != ["compare"]:
        small = random_workload("check", 16, (5, 700), (20, 60), vocab_size)
        print(check(model, small, run_ours(llm, small)), flush=True)
    costs = ModelCosts.of(model.config, dtype.itemsize)
    for name in names:
        for work in [] if name == "startup" else works_for(name, vocab_size):
            if name == "compare":
                new = compare(llm, model, work, args.repeats)
            else:
                limit = None
                if ceilings is not None:
                    lengths = [len(p) for p in work.prompts]
                    limit = fastest_seconds(costs, ceilings, lengths, work.lengths)
                new = [measure(llm, work, args.repeats, limit)]
            report(new)
            rows += new
    llm.close()
    if "startup" in names:
        del model
        rows.append(startup_seconds(path, min(args.repeats, 3)))
    return rows


def limit_over_ranks(
    config: Config, model_config: Any, costs: ModelCosts, ceilings: Ceilings, work: Workload
) -> float:
    """The roofline of a device's share, and every decode step's sums at their measured latency."""
    size = config.tensor_parallel_size
    # Replicated KV heads are not shared.
    kv_parts = min(size, model_config.num_key_value_heads)
    shared: dict[str, int] = {name: value // size for name, value in asdict(costs).items()}
    shared["kv_bytes"] = costs.kv_bytes // kv_parts
    prompts = [len(prompt) for prompt in work.prompts]
    limit = fastest_seconds(ModelCosts(**shared), ceilings, prompts, work.lengths)
    if size == 1:
        return limit
    latency = all_reduce_seconds(config, model_config.hidden_size, len(prompts))
    print(f"sum over {size} ranks of {len(prompts)} rows: {latency * 1e6:.1f} us")
    # Two a layer, the embedding's, and the sampled tokens' maximum.
    sums: int = 2 * model_config.num_hidden_layers + 2
    return limit + (max(work.lengths) - 1) * sums * latency


def run_over_ranks(args: argparse.Namespace, path: Path) -> list[Row]:
    """The workloads on each number of devices in turn, against the first number."""
    ceilings = measure_ceilings(torch.device("cuda")) if torch.cuda.is_available() else None
    model_config = transformers.AutoConfig.from_pretrained(path)
    vocab_size = int(model_config.vocab_size)
    small = random_workload("check", 16, (5, 700), (20, 60), vocab_size)
    works = [work for name in args.workload or ["seeds"] for work in works_for(name, vocab_size)]
    # Repeats find nothing of the ones before.
    options = {"dtype": args.dtype, "enable_prefix_caching": False}
    checked: list[list[list[int]]] = []
    rows: list[Row] = []
    for size in args.tensor_parallel:
        start = time.perf_counter()
        with LLM(path, tensor_parallel_size=size, **options) as llm:
            config = llm.config
            describe(llm, time.perf_counter() - start, ceilings)
            checked.append(run_ours(llm, small))
            measured = [measure(llm, work, args.repeats, None) for work in works]
        dtype = getattr(torch, config.dtype)
        costs = ModelCosts.of(model_config, dtype.itemsize)
        first = rows or measured
        for i, row in enumerate(measured):
            limit = None
            if ceilings is not None:
                limit = limit_over_ranks(config, model_config, costs, ceilings, works[i])
            pairs = zip(first[i].seconds, row.seconds, strict=True)
            rows.append(
                replace(
                    row,
                    engine=f"{size} devices",
                    limit_seconds=limit,
                    speedups=sorted(a / b for a, b in pairs),
                )
            )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    model = model.to(config.device)
    for size, outputs in zip(args.tensor_parallel, checked, strict=True):
        print(f"{size} devices: {check(model, small, outputs)}")
    report(sorted(rows, key=lambda row: row.workload))
    return rows


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[Row | Cost | KernelTime | Overlap] = []
    alone = {n for n in ("scheduler", "kernels", "overlap") if n in (args.workload or ())}
    if alone:
        args.workload = [name for name in args.workload if name not in alone]
    if "scheduler" in alone:
        rows += measure_scheduling(num_steps=300 * args.repeats)
    if "kernels" in alone:
        rows += kernels(args.shape or "qwen3-0.6b", args.repeats)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        path = args.model or DEFAULT_MODEL
        if args.shape:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            path = make_checkpoint(args.shape, Path(scratch), device)
        if args.tensor_parallel:
            rows += run_over_ranks(args, path)
        elif args.workload != []:
            rows += run(args, path)
        if "overlap" in alone:
            rows.append(overlap(path, args.timeline))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
