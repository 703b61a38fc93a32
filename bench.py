"""Throughput of this engine beside transformers, outputs checked before any rate is printed.

    python bench.py                      the shipped model, one request and 32 requests
    python bench.py --model path         a checkpoint of yours
    python bench.py --json results.json  all figures of every repeat as well

Both engines run the same weights, dtype, threads, prompts and output lengths, greedily, in the
same process and in turn, so that a slow phase of the machine hits both.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from llm import LLM, SamplingParams

DEFAULT_MODEL = Path(__file__).parent / "assets" / "qwen3-tiny-python"
# Logits that differ by less than this are a tie in float32: either token is right.
TIE = 1e-3


@dataclass(frozen=True)
class Workload:
    """Requests by their prompts and the number of tokens to generate for each."""

    name: str
    prompts: list[list[int]]
    lengths: list[int]

    @property
    def num_output_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Row:
    """Measurements of one engine on one workload; seconds per repeat, after one warm-up."""

    workload: str
    engine: str
    output_tokens: int
    seconds: list[float]

    @property
    def rates(self) -> list[float]:
        return sorted(self.output_tokens / s for s in self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def make_workload(name: str, count: int, low: int, high: int, vocab_size: int) -> Workload:
    """Random prompts of low..high tokens, each asking for low..high new ones; always the same."""
    rng = random.Random(name)
    prompts = [
        [rng.randrange(vocab_size) for _ in range(rng.randint(low, high))] for _ in range(count)
    ]
    return Workload(name, prompts, [rng.randint(low, high) for _ in range(count)])


def run_ours(llm: LLM, work: Workload) -> list[list[int]]:
    """Tokens of every request, through this engine."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in work.lengths]
    outputs = llm.generate(work.prompts, params, use_tqdm=False)
    return [out["token_ids"] for out in outputs]


def run_transformers(model: Any, work: Workload) -> list[list[int]]:
    """Tokens of every request, through one `generate` call on the left-padded batch."""
    width = max(map(len, work.prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in work.prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in work.prompts])
    longest = max(work.lengths)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=longest,
        max_new_tokens=longest,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [row[:n] for row, n in zip(out[:, width:].tolist(), work.lengths, strict=True)]


@torch.inference_mode()
def disagreements(
    model: Any, work: Workload, ours: list[list[int]], theirs: list[list[int]]
) -> tuple[int, list[str]]:
    """Requests whose tokens differ, and those of them that no tie of logits explains.

    Where two outputs part, the reference's logits for that position decide: the two tokens
    may differ by rounding only.
    """
    differing, wrong = 0, []
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a == b:
            continue
        differing += 1
        at = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None or len(a) != len(b):
            wrong.append(f"request {i}: {len(a)} tokens against {len(b)}")
            continue
        logits = model(torch.tensor([work.prompts[i] + b[:at]])).logits[0, -1]
        gap = float(logits[b[at]] - logits[a[at]])
        if gap > TIE:
            wrong.append(f"request {i}: token {at} is off by {gap:.2g} in its logit")
    return differing, wrong


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Wall seconds of a call, and what it returned."""
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def measure(llm: LLM, model: Any, work: Workload, repeats: int) -> tuple[list[Row], int]:
    """Check, then time both engines in turn; the rows and the number of differing requests.

    Raises:
        SystemExit: the engines disagree.
    """
    runs: dict[str, Callable[[], list[list[int]]]] = {
        "allmos_v2": lambda: run_ours(llm, work),
        "transformers": lambda: run_transformers(model, work),
    }
    outputs = {name: run() for name, run in runs.items()}
    differing, wrong = disagreements(model, work, *outputs.values())
    if wrong:
        sys.exit("the outputs are wrong, so no rate is printed:\n  " + "\n  ".join(wrong))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            elapsed, out = timed(run)
            if out != outputs[name]:
                sys.exit(f"{name} gave other tokens on a repeat, so no rate is printed")
            seconds[name].append(elapsed)
    return [Row(work.name, n, work.num_output_tokens, s) for n, s in seconds.items()], differing


def report(rows: list[Row], differing: int, work: Workload) -> None:
    """Print one workload's table."""
    same = len(work.prompts) - differing
    print(
        f"\n{work.name}: {len(work.prompts)} requests, {sum(map(len, work.prompts))} tokens in, "
        f"{work.num_output_tokens} out; greedy tokens identical in {same}"
        + (f", a tie of logits in {differing}" if differing else "")
    )
    slowest = rows[-1].median
    print(f"  {'engine':<14}{'tok/s':>9}{'min':>9}{'max':>9}{'ratio':>8}")
    for row in rows:
        low, high = row.rates[0], row.rates[-1]
        print(
            f"  {row.engine:<14}{row.median:>9.0f}{low:>9.0f}{high:>9.0f}"
            f"{row.median / slowest:>7.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="checkpoint folder")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each engine")
    parser.add_argument("--threads", type=int, default=None, help="torch threads of both engines")
    parser.add_argument("--json", type=Path, default=None, help="write all figures here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    llm = LLM(args.model, dtype="float32", device="cpu")
    ready = time.perf_counter() - start
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = model.eval()
    print(
        f"{args.model.name}, float32, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; engine ready after {ready:.1f} s; median of {args.repeats}"
    )
    vocab_size = int(model.config.vocab_size)
    works = [
        make_workload("one request", 1, 128, 128, vocab_size),
        make_workload("32 mixed requests", 32, 16, 256, vocab_size),
    ]
    all_rows = []
    for work in works:
        rows, differing = measure(llm, model, work, args.repeats)
        report(rows, differing, work)
        all_rows += rows
    llm.close()
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in all_rows], indent=1))


if __name__ == "__main__":
    main()
