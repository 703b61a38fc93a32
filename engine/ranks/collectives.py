"""Makes the model runner of one rank, with collectives that compute sums and maxima over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta
from itertools import permutations, starmap
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from config import Config
from engine.model_runner import LocalRunner
from engine.ranks.worker import LostPeerError, Rank
from layers.kernels.launch import dependent_launch, fused
from layers.parallel import ParallelContext, ordered_sum
from models import find_architecture
from utils.checkpoint import Checkpoint
from utils.errors import ConfigError

if TYPE_CHECKING:
    from layers.kernels.peer import PeerExchange

# Time limit of a collective. It may be long, as the runner kills all ranks if one of them fails.
_TIMEOUT = timedelta(hours=1)
# GPUs sum tensors of up to this many bytes without NCCL. 256 hidden states of Qwen3-8B have 2 MiB.
_PEER_BYTES = 2 << 20
# Up to this many received bytes a sum takes one collective instead of two (see `_gathers`).
_GATHER_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class GroupContext(ParallelContext):
    """Collectives of a rank. They use gloo on CPUs, and NCCL on GPUs.

    For sums gloo and NCCL only carry the parts. In their own sums, order and rounding depend on the
    size of the tensor and on the devices' links. Maxima of integers have no order.

    If `exchange` is set, sums and maxima of small tensors are computed without NCCL: each GPU
    writes its values directly into the memory of the other GPUs.
    """

    _: KW_ONLY
    group: Any  # torch's `ProcessGroup` of the ranks
    exchange: PeerExchange | None = None
    memory: Tensor | None = None  # this GPU's memory for `exchange`; freed with this object
    rehearses: Event = field(default_factory=Event)  # while set, collectives send no data

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
        if x.numel() == 0:
            return x
        if self._gathers(x):
            return ordered_sum(self.all_gather(x), x.dtype)
        # Every rank adds up an equal share of the elements.
        flat, count = x.reshape(-1), x.numel()
        if count % self.size:
            flat = F.pad(flat, (0, -count % self.size))
        parts = self._all_to_all(flat.view(self.size, -1))
        return self.all_gather(ordered_sum(parts, x.dtype)).view(-1)[:count].view(x.shape)

    def all_max(self, x: Tensor) -> Tensor:
        if self.exchange is not None and self.exchange.takes_max(x):
            return self.exchange.all_max(x)
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        # With asyncOp False, NCCL uses the current CUDA stream, not a separate stream.
        options.asyncOp = False
        self._send(lambda: self.group.allreduce([x], options))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x, options = x.contiguous(), AllgatherOptions()
        whole, options.asyncOp = self._received(x, (self.size, *x.shape)), False
        # gloo takes no tensors of [size, *x.shape].
        self._send(lambda: self.group._allgather_base(whole.view(-1), x.view(-1), options))
        return whole

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, gained: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        if self.exchange is None or not self.exchange.takes_sum(x):
            return None
        return self.exchange.add_rms_norm(x, residual, weight, eps, gained=gained)

    def _all_to_all(self, x: Tensor) -> Tensor:
        """Send x[i] to rank i. Returns what was received, in order of rank, in the shape of x."""
        x, options = x.contiguous(), dist.AllToAllOptions()
        parts, options.asyncOp = self._received(x, x.shape), False
        self._send(lambda: self.group.alltoall_base(parts, x, [], [], options))
        return parts

    def _gathers(self, x: Tensor) -> bool:
        """Whether `all_reduce` gathers all parts of x. Otherwise each rank adds up a share of x.

        With N ranks a rank receives (N - 1) times the bytes of x if it gathers them, and otherwise
        2 (N - 1) / N times, by two collectives. For two ranks these are equal. For more, the limit
        is an estimate, not a measurement: a second collective may cost 10 us, in which NVLink
        carries some MB. The bits are the same.
        """
        return self.size == 2 or (self.size - 1) * x.numel() * x.element_size() <= _GATHER_BYTES

    def _received(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        # In a rehearsal nothing arrives, and garbage from here could become a token id.
        return (x.new_zeros if self.rehearses.is_set() else x.new_empty)(shape)

    def _send(self, collective: Callable[[], Any]) -> None:
        if self.rehearses.is_set():
            return
        try:
            if (work := collective()) is not None:
                work.wait()
        except RuntimeError as error:
            raise LostPeerError(str(error)) from error


def gloo_context(index: int, size: int, store: Any) -> GroupContext:
    """Return a rank's collectives on a CPU. gloo uses only the loopback network interface."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = _TIMEOUT
    return GroupContext(index, size, group=dist.ProcessGroupGloo(store, index, size, options))


def nccl_context(index: int, size: int, store: Any) -> GroupContext:
    """Return a rank's collectives on its GPU. Raises ConfigError if NCCL cannot connect GPUs."""
    device = torch.device("cuda", torch.cuda.current_device())
    about: Any = {"rank": index, "world_size": size, "timeout": _TIMEOUT, "device_id": device}
    try:
        dist.init_process_group("nccl", store=store, **about)
    except dist.DistBackendError as error:
        problem = f"NCCL does not connect these devices ({error})"
        fix = "Choose others by CUDA_VISIBLE_DEVICES, or use 1."
        # NCCL also fails if another rank has failed. If an error's cause is a LostPeerError, the
        # runner raises the other rank's error instead of this one.
        lost = LostPeerError(str(error))
        raise ConfigError("tensor_parallel_size", size, problem, fix) from lost
    return GroupContext(index, size, group=dist.group.WORLD)


def peer_context(context: GroupContext, dtype: torch.dtype, width: int) -> GroupContext:
    """Return collectives that sum tensors of `width` columns without NCCL if the GPUs allow it."""
    device = torch.device("cuda", torch.cuda.current_device())
    pairs = permutations(range(context.size), 2)
    mapped = all(starmap(torch.cuda.can_device_access_peer, pairs))
    if not mapped or width % 8 or not fused(device, dtype):
        return context
    from torch.distributed import _symmetric_memory as symmetric

    from layers.kernels.peer import PeerExchange

    rows = max(1, _PEER_BYTES // (width * dtype.itemsize))
    count = PeerExchange.num_words(context.size, rows, width)
    # `symmetric.empty` would import sympy, which takes 2 s. The engine's start takes 8 s in all.
    allocate = symmetric._SymmetricMemory.empty_strided_p2p  # type: ignore[attr-defined]
    memory = allocate((count,), (1,), torch.int64, device)
    PeerExchange.empty(memory, context.size, rows)
    mapping = symmetric.rendezvous(memory, context.group)
    torch.cuda.synchronize(device)
    # Without this wait a rank could write values that a slower rank's call of `empty` then erases.
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
    """Connect this process to the other ranks; return its collectives. Rank i uses GPU i.

    peer: whether GPUs may sum small tensors of `width` columns by writing into each other's memory.
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
    """Make the model runner of a rank, in the rank's process. `join_ranks` explains `peer`."""
    context = join_ranks(config, rank, int(checkpoint.hf_config.hidden_size), peer=peer)
    if config.device == "cpu":
        # pipeline_depth 1 would run steps in a thread during planning. Here another process plans.
        config = replace(config, pipeline_depth=0)
    return LocalRunner(config, checkpoint, context)


def check_divides(config: Config, checkpoint: Checkpoint) -> None:
    """Raise a ConfigError for too few GPUs, or if ranks cannot share attention heads evenly."""
    size = config.tensor_parallel_size
    if config.device == "cuda" and size > (count := torch.cuda.device_count()):
        problem = f"there are {count} CUDA devices"
        raise ConfigError("tensor_parallel_size", size, problem, f"Use {count} or less.")
    shape = find_architecture(checkpoint).model_shape(checkpoint.hf_config)
    any_rank = ParallelContext(0, size)
    any_rank.per_rank("query heads", shape.num_heads)
    any_rank.kv_heads(shape.num_kv_heads)
