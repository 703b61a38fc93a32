"""What a sum over the ranks costs on this machine.

`python -m benchmarks.collective_cost [ranks]` compares sums of many rows, which are added up in
order of rank, with NCCL's all-reduce, whose order and rounding are its own.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from functools import partial
from importlib import import_module
from typing import Any

import torch

from benchmarks.roofline import median_seconds
from config import Config
from engine.ranks.collectives import join_ranks
from engine.ranks.runner import TensorParallelRunner
from engine.ranks.worker import Rank
from engine.types import KVGeometry, ModelRunner, StepHandle, StepPlan, StepResult

_REPEATS = 100
_ROWS, _WIDTHS = (512, 1024, 4096, 8192), (1024, 4096)


class _Timed(StepHandle):
    def __init__(self, step_id: int, nanoseconds: int) -> None:
        self._result = StepResult(step_id, [[nanoseconds]], time.perf_counter())

    def result(self) -> StepResult:
        return self._result


class AllReduceTimer(ModelRunner):
    """A rank that adds up as many rows as a plan has decodes, and answers with the time it took.

    On CUDA many sums are captured in one graph, as a decode step has them. With `nccl`, the sums
    are NCCL's, in place.
    """

    name = "all_reduce_timer"

    def __init__(
        self,
        config: Config,
        checkpoint: Any,
        rank: Rank,
        *,
        width: int,
        peer: bool,
        nccl: bool = False,
    ) -> None:
        del checkpoint
        self._parallel = join_ranks(config, rank, width, peer=peer)
        self._where: dict[str, Any] = {
            "dtype": getattr(torch, config.dtype),
            "device": torch.device(config.device),
        }
        self._width, self._nccl = width, nccl

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        return (KVGeometry(1, 1, 1, 16, 1, 1),)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepHandle:
        x = torch.zeros(len(plan.decode), self._width, **self._where)

        def run() -> None:
            for _ in range(_REPEATS):
                if self._nccl:
                    torch.distributed.all_reduce(x)
                else:
                    self._parallel.all_reduce(x)

        run()
        seconds = self._graph_seconds(run) if x.is_cuda else _wall_seconds(run)
        return _Timed(plan.step_id, int(1e9 * seconds / _REPEATS))

    def close(self) -> None:
        """Nothing is held."""

    @staticmethod
    def _graph_seconds(run: Any) -> float:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return median_seconds(graph.replay)


def _wall_seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def all_reduce_seconds(
    config: Config, width: int, rows: int, *, peer: bool = True, nccl: bool = False
) -> float:
    """Seconds of one sum of [rows, width] over the ranks of a resolved config.

    Args:
        peer: see `engine.ranks.collectives.join_ranks`.
        nccl: whether NCCL adds up, in an order of its own.
    """
    checkpoint: Any = None
    make = partial(AllReduceTimer, width=width, peer=peer, nccl=nccl)
    with closing(TensorParallelRunner(config, checkpoint, make)) as ranks:
        result = ranks.execute(StepPlan(0, decode=tuple(range(rows)))).result()
    return result.tokens[0][0] / 1e9


def main(size: int) -> None:
    """Print microseconds of a sum in order of rank and of NCCL's, and their ratio."""
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "tensor_parallel_size": size}
    config = Config(model="any", **options)
    print(f"{size} ranks: rows x width, in order of rank (us), all-reduce of NCCL (us), ratio")
    for width in _WIDTHS:
        for rows in _ROWS:
            # `peer` would take the smallest of these sums away from NCCL.
            ours, theirs = (
                1e6 * all_reduce_seconds(config, width, rows, peer=False, nccl=nccl)
                for nccl in (False, True)
            )
            print(f"{rows:5} x {width:4} {ours:8.1f} {theirs:8.1f} {ours / theirs:6.2f}")


if __name__ == "__main__":
    # The ranks could not import a timer that belongs to `__main__`.
    this = import_module("benchmarks.collective_cost")
    this.main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
