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
# Sums up to this size are read from the peers. Every rank reads all of every peer, so that for
# large ones NCCL's rings move less; where the two cross is not measured yet.
_PEER_BYTES = 256 << 10
# The kernel moves 16 bytes a thread.
_PEER_ALIGNMENT = 16


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


@dataclass(frozen=True, slots=True)
class PeerContext(GroupContext):
    """As NCCL's, but small sums are read straight from the peers' memory, in one kernel.

    Each rank copies its part into a buffer that the others have mapped, waits for theirs, and
    adds them all up. That moves more bytes than a ring and takes one trip instead of many. It
    can be captured, and needs no multicast.

    Attributes:
        buffer: [n] symmetric memory of the one dtype that is summed so.
    """

    buffer: Tensor = field(kw_only=True)

    def all_reduce(self, x: Tensor) -> Tensor:
        buffer = self.buffer
        fits = x.dtype == buffer.dtype and 0 < x.numel() <= buffer.numel()
        if not fits or x.nbytes % _PEER_ALIGNMENT:
            return self._reduce(x, dist.ReduceOp.SUM)
        add = torch.ops.symm_mem.one_shot_all_reduce_copy
        mine = buffer[: x.numel()].view(x.shape)
        return add(mine, x, "sum", self.group.group_name)  # type: ignore[no-any-return]


def peer_context(context: GroupContext, dtype: torch.dtype) -> GroupContext:
    """`context` of NCCL with small sums of `dtype` through peer memory, where devices allow it."""
    devices = range(context.size)
    if not all(torch.cuda.can_device_access_peer(a, b) for a in devices for b in devices if a != b):
        return context
    from torch.distributed import _symmetric_memory as symmetric

    device = torch.device("cuda", torch.cuda.current_device())
    buffer = symmetric.empty(_PEER_BYTES // dtype.itemsize, dtype=dtype, device=device)
    symmetric.rendezvous(buffer, context.group)
    return PeerContext(context.rank, context.size, group=context.group, buffer=buffer)


def join_ranks(config: Config, rank: Rank, *, peer: bool = True) -> GroupContext:
    """This process's place among the ranks; on CUDA it takes the device of its index.

    Args:
        peer: use peer memory for small sums, if possible.
    """
    torch.set_num_threads(rank.num_threads)
    store = dist.FileStore(rank.store, rank.size)  # type: ignore[attr-defined]
    if config.device != "cuda":
        return gloo_context(rank.index, rank.size, store)
    torch.cuda.set_device(rank.index)
    context = nccl_context(rank.index, rank.size, store)
    return peer_context(context, getattr(torch, config.dtype)) if peer else context


def local_rank(
    config: Config, checkpoint: Checkpoint, rank: Rank, *, peer: bool = True
) -> ModelRunner:
    """The runner of one rank, in a process of its own: a `LocalRunner` that has joined the others.

    Args:
        peer: see `join_ranks`.
    """
    context = join_ranks(config, rank, peer=peer)
    if config.device == "cpu":
        # The parent runs ahead already; a thread here would only add its own overhead.
        config = replace(config, pipeline_depth=0)
    return LocalRunner(config, checkpoint, context)
