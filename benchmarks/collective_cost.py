"""What a sum over the ranks costs on this machine."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from typing import Any

import torch

from benchmarks.roofline import median_seconds
from config import Config
from engine.ranks.collectives import join_ranks
from engine.ranks.runner import TensorParallelRunner
from engine.ranks.worker import Rank
from engine.types import KVGeometry, ModelRunner, StepHandle, StepPlan, StepResult

_REPEATS = 100


class _Timed(StepHandle):
    def __init__(self, step_id: int, nanoseconds: int) -> None:
        self._result = StepResult(step_id, [[nanoseconds]], time.perf_counter())

    def result(self) -> StepResult:
        return self._result


class AllReduceTimer(ModelRunner):
    """A rank that adds up as many rows as a plan has decodes, and answers with the time it took.

    On CUDA many sums are captured in one graph, as a decode step has them.
    """

    name = "all_reduce_timer"

    def __init__(
        self, config: Config, checkpoint: Any, rank: Rank, *, width: int, peer: bool
    ) -> None:
        del checkpoint
        self._parallel = join_ranks(config, rank, width, peer=peer)
        self._where: dict[str, Any] = {
            "dtype": getattr(torch, config.dtype),
            "device": torch.device(config.device),
        }
        self._width = width

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        return (KVGeometry(1, 1, 1, 16, 1, 1),)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepHandle:
        x = torch.zeros(len(plan.decode), self._width, **self._where)

        def run() -> None:
            for _ in range(_REPEATS):
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


def all_reduce_seconds(config: Config, width: int, rows: int, *, peer: bool = True) -> float:
    """Seconds of one sum of [rows, width] over the ranks of a resolved config.

    Args:
        peer: see `engine.ranks.collectives.join_ranks`.
    """
    checkpoint: Any = None
    make = partial(AllReduceTimer, width=width, peer=peer)
    with closing(TensorParallelRunner(config, checkpoint, make)) as ranks:
        result = ranks.execute(StepPlan(0, decode=tuple(range(rows)))).result()
    return result.tokens[0][0] / 1e9
