"""The model runner of one rank, and its collectives: sums and maxima over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta
from itertools import permutations, starmap
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from config import Config
from engine.model_runner import LocalRunner, find_architecture
from engine.ranks.worker import LostPeerError, Rank
from layers.kernels.launch import dependent_launch, fused
from layers.parallel import ParallelContext
from utils.checkpoint import Checkpoint
from utils.errors import ConfigError

if TYPE_CHECKING:
    from layers.kernels.peer import PeerExchange

# When a rank fails, the parent process kills the ranks that wait for it long before this timeout.
_TIMEOUT = timedelta(hours=1)
# Most bytes that are summed through peer memory: 256 rows of Qwen3-8B's 4,096 16-bit values.
_PEER_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class GroupContext(ParallelContext):
    """A rank's collectives through a process group: gloo on CPUs, NCCL on GPUs.

    CUDA graphs can capture NCCL's collectives. If `exchange` is set, small tensors are reduced
    through peer memory instead of NCCL: each device writes into the memory of the other devices.
    """

    _: KW_ONLY
    group: Any  # has a `ProcessGroup`'s `allreduce`
    exchange: PeerExchange | None = None
    memory: Tensor | None = None  # keeps the memory of `exchange` allocated
    rehearses: Event = field(default_factory=Event)  # while set, collectives do not communicate

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        self.rehearses.set()
        try:
            yield
        finally:
            self.rehearses.clear()

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.exchange is not None and self.exchange.takes_sum(x):
            return self.exchange.all_reduce(x)
        return self._reduce(x, dist.ReduceOp.SUM)

    def all_max(self, x: Tensor) -> Tensor:
        if self.exchange is not None and self.exchange.takes_max(x):
            return self.exchange.all_max(x)
        return self._reduce(x, dist.ReduceOp.MAX)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | None:
        if self.exchange is None or not self.exchange.takes_sum(x):
            return None
        return self.exchange.add_rms_norm(x, residual, weight, eps)

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        if self.rehearses.is_set():
            return x
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        # Run on the current stream, not on a stream of NCCL's own.
        options.asyncOp = False
        try:
            if (work := self.group.allreduce([x], options)) is not None:
                work.wait()
        except RuntimeError as error:
            raise LostPeerError(str(error)) from error
        return x


def gloo_context(index: int, size: int, store: Any) -> GroupContext:
    """The context of a rank on a CPU; gloo connects the ranks by the loopback interface alone."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = _TIMEOUT
    return GroupContext(index, size, group=dist.ProcessGroupGloo(store, index, size, options))


def nccl_context(index: int, size: int, store: Any) -> GroupContext:
    """A rank's context on the current CUDA device; a ConfigError if NCCL cannot connect devices."""
    device = torch.device("cuda", torch.cuda.current_device())
    about: Any = {"rank": index, "world_size": size, "timeout": _TIMEOUT, "device_id": device}
    try:
        dist.init_process_group("nccl", store=store, **about)
    except dist.DistBackendError as error:
        problem = f"NCCL does not connect these devices ({error})"
        fix = "Choose others by CUDA_VISIBLE_DEVICES, or use 1."
        # NCCL also fails if another rank has ended. The runner then raises the other rank's error.
        lost = LostPeerError(str(error))
        raise ConfigError("tensor_parallel_size", size, problem, fix) from lost
    return GroupContext(index, size, group=dist.group.WORLD)


def peer_context(context: GroupContext, dtype: torch.dtype, width: int) -> GroupContext:
    """Add `exchange` to `context` for sums of few rows [T, width], if the devices support that."""
    device = torch.device("cuda", torch.cuda.current_device())
    pairs = permutations(range(context.size), 2)
    mapped = all(starmap(torch.cuda.can_device_access_peer, pairs))
    if not mapped or width % 8 or not fused(device, dtype):
        return context
    from torch.distributed import _symmetric_memory as symmetric

    from layers.kernels.peer import PeerExchange

    rows = max(1, _PEER_BYTES // (width * dtype.itemsize))
    count = PeerExchange.num_words(context.size, rows, width)
    # symmetric.empty also allocates peer memory, but imports sympy: 2 s of a start that takes 8 s.
    allocate = symmetric._SymmetricMemory.empty_strided_p2p  # type: ignore[attr-defined]
    memory = allocate((count,), (1,), torch.int64, device)
    PeerExchange.empty(memory, context.size, rows)
    mapping = symmetric.rendezvous(memory, context.group)
    torch.cuda.synchronize(device)
    # A rank must not write into a peer's memory before the peer has marked this memory as empty.
    mapping.barrier()
    exchange = PeerExchange(
        rank=context.rank,
        addresses=[int(address) for address in mapping.buffer_ptrs],
        rows=rows,
        width=width,
        dtype=dtype,
        device=device,
        pdl=dependent_launch(device),
        rehearses=context.rehearses,
    )
    return replace(context, exchange=exchange, memory=memory)


def join_ranks(config: Config, rank: Rank, width: int, *, peer: bool = True) -> GroupContext:
    """Connect this process to the other ranks; on CUDA it uses the device with the rank's index.

    With `peer`, sums of few rows [T, width] go through peer memory if the devices support that.
    """
    torch.set_num_threads(rank.num_threads)
    store = dist.FileStore(rank.store, rank.size)  # type: ignore[attr-defined]
    if config.device != "cuda":
        return gloo_context(rank.index, rank.size, store)
    torch.cuda.set_device(rank.index)
    context = nccl_context(rank.index, rank.size, store)
    return peer_context(context, getattr(torch, config.dtype), width) if peer else context


def local_rank(
    config: Config, checkpoint: Checkpoint, rank: Rank, *, peer: bool = True
) -> LocalRunner:
    """Make the runner of one rank in the rank's process; for `peer` see `join_ranks`."""
    context = join_ranks(config, rank, int(checkpoint.hf_config.hidden_size), peer=peer)
    if config.device == "cpu":
        # The parent process plans while ranks compute: a worker thread here would only cost time.
        config = replace(config, pipeline_depth=0)
    return LocalRunner(config, checkpoint, context)


def check_divides(config: Config, checkpoint: Checkpoint) -> None:
    """Raise a ConfigError if there are too few devices or the model cannot be divided."""
    size = config.tensor_parallel_size
    if config.device == "cuda" and size > (count := torch.cuda.device_count()):
        problem = f"there are {count} CUDA devices"
        raise ConfigError("tensor_parallel_size", size, problem, f"Use {count} or less.")
    shape = find_architecture(checkpoint).model_shape(checkpoint.hf_config)
    any_rank = ParallelContext(0, size)
    any_rank.per_rank("query heads", shape.num_heads)
    any_rank.kv_heads(shape.num_kv_heads)
