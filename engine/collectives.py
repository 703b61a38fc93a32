"""What ranks compute together: sums and maxima over a process group."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from config import Config
from engine.model_runner import LocalRunner
from engine.types import ModelRunner
from engine.worker import LostPeerError, Rank
from layers.parallel import ParallelContext
from utils.checkpoint import Checkpoint

# A rank that waits has lost a peer long before this; the parent ends it much sooner.
_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class GroupContext(ParallelContext):
    """A rank whose collectives are a process group's: gloo's on CPUs, NCCL's on GPUs.

    NCCL's can be captured in CUDA graphs. A faster means for some sizes subclasses this.

    Attributes:
        group: what has a `ProcessGroup`'s `allreduce`.
    """

    group: Any = field(kw_only=True)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.SUM)

    def all_max(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        # On the current stream, instead of one of NCCL's own.
        options.asyncOp = False
        try:
            work = self.group.allreduce([x], options)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise LostPeerError(str(error)) from error
        return x


def gloo_context(index: int, size: int, store: Any) -> GroupContext:
    """A rank on a CPU, connected to the others over this machine's loopback alone."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = _TIMEOUT
    return GroupContext(index, size, group=dist.ProcessGroupGloo(store, index, size, options))


def nccl_context(index: int, size: int, store: Any) -> GroupContext:
    """A rank on the current CUDA device."""
    dist.init_process_group(
        "nccl",
        store=store,
        rank=index,
        world_size=size,
        timeout=_TIMEOUT,
        device_id=torch.device("cuda", torch.cuda.current_device()),
    )
    return GroupContext(index, size, group=dist.group.WORLD)


def local_rank(config: Config, checkpoint: Checkpoint, rank: Rank) -> ModelRunner:
    """The runner of one rank, in a process of its own: a `LocalRunner` that has joined the others.

    On CUDA rank i takes device i.
    """
    torch.set_num_threads(rank.num_threads)
    store = dist.FileStore(rank.store, rank.size)  # type: ignore[attr-defined]
    if config.device == "cuda":
        torch.cuda.set_device(rank.index)
        context = nccl_context(rank.index, rank.size, store)
    else:
        # The parent runs ahead already; a thread here would only add its own overhead.
        config = replace(config, pipeline_depth=0)
        context = gloo_context(rank.index, rank.size, store)
    return LocalRunner(config, checkpoint, context)
