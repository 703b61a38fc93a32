"""This checkout beside another one, in turn on one machine.

    git worktree add ../before HEAD~20
    python -m benchmarks.against ../before --shape qwen3-0.6b --workload seeds latency ttft ready
    python -m benchmarks.against ../before --model path --profile 256

Each checkout has an engine in a process of its own. Both engines stay, and run each workload in
turn, so that neither has a warmer machine. The prompts of each pair are rotated, so that no prefix
cache knows them. What is printed is the speed of this checkout as a multiple of the other's: the
median over the pairs, the slowest and the fastest pair. Both must give as many tokens as asked for.

ready     construction to ready: with no compiled kernels, one engine after the other, then with
          them, in new processes
--profile the kernels that take most time in decodes of so many requests, by torch's profiler
others    as in bench.py

On CUDA give `--options '{"num_kvcache_blocks": 1300}'`, so that both engines fit the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import EngineFailedError
from benchmarks.random_weights import SHAPES, make_checkpoint
from benchmarks.variants import FILTERS, filters_workload
from benchmarks.workloads import Workload, random_workload, works_of
from utils.checkpoint import open_checkpoint

_ROOT = Path(__file__).parents[1]
_WORKLOADS = ("seeds", "seeds128", "latency", "ttft", "flood", "small", "filters", "ready")
Job = tuple[Workload, dict[str, Any]]


class Engine:
    """An engine of a checkout, in a process that answers one line of JSON with another."""

    def __init__(self, root: Path, model: Path, options: dict[str, Any], cache: str) -> None:
        worker = str(Path(__file__).with_name("against_worker.py"))
        self._process = subprocess.Popen(
            [sys.executable, worker, str(root.resolve()), str(model.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRITON_CACHE_DIR": cache},
        )
        self.ready_seconds: float = self.ask(options)["seconds"]

    def ask(self, question: Any) -> Any:
        """What the process answers. Raises an EngineFailedError if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its output tells why
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise EngineFailedError(f"the process ended with exit code {self._process.wait()}")

    def seconds(self, job: Job) -> tuple[float, str]:
        """How long the requests take, and a digest of all tokens."""
        work, others = job
        params = [
            {"temperature": work.temperature, "max_tokens": n, "ignore_eos": True, **others}
            for n in work.lengths
        ]
        answer = self.ask({"prompts": work.prompts, "params": params})
        if answer["lengths"] != work.lengths:
            raise EngineFailedError(f"{work.name}: other numbers of tokens than {work.lengths}")
        return answer["seconds"], answer["digest"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def jobs(names: Sequence[str], vocab_size: int, cuda: bool) -> Iterator[tuple[str, Job]]:
    """Names and requests of workloads; `ready` has none."""
    for work in works_of([name for name in names if name not in ("filters", "ready")], vocab_size):
        yield work.name, (work, {})
    if "filters" in names:
        work = filters_workload("cuda" if cuda else "cpu", vocab_size)
        for variant in FILTERS:
            yield f"{work.name}, {variant.name}", (work, {**variant.params})


def compare(engines: Sequence[Engine], job: Job, pairs: int) -> str:
    """Run a job in turn on the engines (another checkout's, this one's); the result in words."""
    work, others = job
    for engine in engines:
        engine.seconds((work.rotated(1), others))
    times: list[list[float]] = []
    equal = 0
    for pair in range(pairs):
        rotated = work.rotated(2 + pair), others
        found = [engine.seconds(rotated) for engine in engines[:: 1 if pair % 2 else -1]]
        found = found[:: 1 if pair % 2 else -1]
        times.append([seconds for seconds, _ in found])
        equal += found[0][1] == found[1][1]
    speeds = [other / mine for other, mine in times]
    before, now = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return (
        f"{statistics.median(speeds):.3f} [{min(speeds):.3f}, {max(speeds):.3f}] in {pairs} pairs, "
        f"{before:.2f} -> {now:.2f} ms, equal tokens in {equal}"
    )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="the root of the other checkout")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--shape", choices=sorted(SHAPES))
    chosen.add_argument("--model", type=Path)
    parser.add_argument("--workload", nargs="+", choices=_WORKLOADS, default=["latency"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--profile", type=int, metavar="REQUESTS")
    parser.add_argument("--options", type=json.loads, default={}, help="of both LLMs, as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    cuda = torch.cuda.is_available() and args.options.get("device") != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        caches = [str(Path(folder, name)) for name in ("other", "this")]
        model = args.model or make_checkpoint(args.shape, Path(folder), "cuda" if cuda else "cpu")
        roots, engines = (args.other, _ROOT), []
        try:
            for root, cache in zip(roots, caches, strict=True):
                engines.append(Engine(root, model, args.options, cache))
                sys.stdout.write(
                    f"{root.resolve().name}: ready {engines[-1].ready_seconds:.2f} s\n"
                )
            vocab_size = int(open_checkpoint(str(model)).hf_config.vocab_size)
            for name, job in jobs(args.workload, vocab_size, cuda):
                sys.stdout.write(f"{name}: {compare(engines, job, args.pairs)}\n")
                sys.stdout.flush()
            for root, engine in zip(roots, engines, strict=True):
                if args.profile:
                    work = random_workload("p", args.profile, (32, 32), (64, 64), vocab_size)
                    kernels = engine.ask({"prompts": work.prompts, "profile": 64})["kernels"]
                    sys.stdout.write("\n  ".join([root.resolve().name, *kernels]) + "\n")
        finally:
            for engine in engines:
                engine.close()
        for pair in range(args.pairs if "ready" in args.workload else 0):
            for i in (0, 1) if pair % 2 else (1, 0):
                engine = Engine(roots[i], model, args.options, caches[i])
                engine.close()
                name = roots[i].resolve().name
                sys.stdout.write(f"{name}: ready again {engine.ready_seconds:.2f} s\n")


if __name__ == "__main__":
    main()
