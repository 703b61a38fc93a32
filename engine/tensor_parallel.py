"""A runner whose model is divided over several processes, one per device."""

from __future__ import annotations

import torch

from config import Config
from engine.collectives import local_rank
from engine.model_runner import find_architecture
from engine.processes import Workers
from engine.types import KVGeometry, ModelRunner, StepHandle, StepPlan, StepResult
from engine.worker import MakeRunner
from layers.parallel import ParallelContext
from utils.checkpoint import Checkpoint
from utils.errors import ConfigError, EngineClosedError


class TensorParallelRunner(ModelRunner):
    """Sends every plan to the ranks, each of which runs it on its share of the model.

    The process that schedules runs no model: a rank that fails takes nothing of the caller's
    with it, and planning overlaps with what the ranks do on the host.

    Args:
        config: resolved; tensor_parallel_size says how many ranks.
        checkpoint: the model's folder.
        make_runner: what makes a rank's runner in its process.

    Raises:
        ConfigError: the model's heads do not divide by the ranks, or there are too few devices.
        WorkerDiedError: a rank's process ended while it loaded. Other errors of a rank while it
            loads are raised as they are.
    """

    name = "tensor_parallel"

    def __init__(
        self, config: Config, checkpoint: Checkpoint, make_runner: MakeRunner = local_rank
    ) -> None:
        if getattr(make_runner, "func", make_runner) is local_rank:
            check_divides(config, checkpoint)
        self._closed = False
        num_threads = max(1, torch.get_num_threads() // config.tensor_parallel_size)
        self._workers = Workers(config, checkpoint, make_runner, self.host_clock, num_threads)

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        """Of each rank: its share of the KV heads."""
        return self._workers.groups

    def execute(self, plan: StepPlan) -> StepHandle:
        if self._closed:
            raise EngineClosedError("execute() after close()")
        return _Sent(self._workers, self._workers.send(plan))

    def close(self) -> None:
        """End all ranks; may be called twice.

        Raises:
            WorkerDiedError: one died instead of ending; all the same, nothing is left of any.
        """
        self._closed = True
        self._workers.close()


class _Sent(StepHandle):
    """A step that the ranks run."""

    def __init__(self, workers: Workers, number: int) -> None:
        self._workers = workers
        self._number = number
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        if self._result is None:
            self._result = self._workers.result(self._number)
            self._workers.forget(self._number)
        return self._result


def check_divides(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse what cannot work before any process is started.

    Raises:
        ConfigError: see `TensorParallelRunner`.
    """
    size = config.tensor_parallel_size
    if config.device == "cuda" and size > (count := torch.cuda.device_count()):
        raise ConfigError(
            "tensor_parallel_size", size, f"there are {count} CUDA devices", f"Use {count} or less."
        )
    shape = find_architecture(checkpoint).model_shape(checkpoint.hf_config)
    any_rank = ParallelContext(0, size)
    any_rank.per_rank("query heads", shape.num_heads)
    any_rank.kv_heads(shape.num_kv_heads)
