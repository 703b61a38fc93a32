"""Sums and maxima over the GPUs of one host, through memory that all these GPUs have mapped.

One kernel computes a sum over ranks, adds the residual and applies the RMSNorm. Every rank writes
its summand to the memory of all other ranks, and adds up the summands that other ranks wrote to its
own memory. A memory cell that holds -0 is empty; senders replace -0 by +0. The receiver waits until
its cells are full, and empties them again. So data need no fence, barrier or flag, as in
TensorRT-LLM's "Lamport" all-reduce.

A program handles one row of each sum. A sum of one row is an exchange, and the program numbers its
exchanges. Even and odd exchanges have separate cells, so exchange n + 2 writes to the cells of
exchange n. These cells are empty by then: a rank begins exchange n + 2 after all its peers have
sent their values of exchange n + 1, which they do after emptying their cells of exchange n.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from layers.kernels.rowwise import warps_of_row

_EMPTY_MAX = torch.iinfo(torch.int64).min  # empty cell of `all_max`: less than all sent values
_MAX_BLOCK = 64  # number of elements per program of `_max_kernel`
# In one shot every rank adds up all rows. In two shots each row is added up by one rank, which
# sends the sum to the others. Sums of more bytes than this over more than two ranks take two shots.
# On four H200, a sum with residual and norm of 64, 128 or 256 rows of 1,024 elements takes 4.9, 5.9
# or 8.7 us in one shot, 5.3, 5.9 or 6.8 us in two shots, and 12.9, 12.6 or 15.6 us with NCCL.
_TWO_SHOT_BYTES = 256 << 10


@triton.jit
def _address(buffers_ptr, rank, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(buffers_ptr + rank).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _receive(ptr, mask, empty):
    """Wait until peers have filled all cells in `mask`; return the values and empty the cells."""
    got = tl.load(ptr, mask=mask, other=0, volatile=True)
    while tl.sum(((got == empty) & mask).to(tl.int32)) > 0:
        got = tl.load(ptr, mask=mask, other=0, volatile=True)
    tl.store(ptr, tl.zeros_like(got) + empty, mask=mask)
    return got


@triton.jit
def _cells(x):
    """Return the bits of 16-bit floats x; -0 becomes +0, since -0 marks an empty cell."""
    bits = x.to(tl.int16, bitcast=True)
    return tl.where(bits == -32768, 0, bits).to(tl.int16)


@triton.jit
def _gathered(mine, own, stride, mask, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Return the sum of all ranks' summands, added in the same order on every rank."""
    rank = tl.arange(0, triton.next_power_of_2(SIZE))[:, None]
    theirs = (rank != RANK) & (rank < SIZE) & mask[None, :]
    # All peers are polled at once. Polling one peer after another would add up read latencies.
    got = _receive(own[None, :] + rank * stride, theirs, -32768)
    bits = tl.where(rank == RANK, mine.to(tl.int16, bitcast=True)[None, :], got)
    return tl.sum(bits.to(mine.dtype, bitcast=True).to(tl.float32), axis=0)


@triton.jit
def _sum_kernel(
    x_ptr,
    norm,
    out_ptr,
    buffers_ptr,
    count_ptr,
    strides,
    size,
    capacity,
    eps,
    SPLITS: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    x_stride, split_stride, residual_stride = strides
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    if PDL:
        gdc_launch_dependents()
    # No kernel writes the weight or the addresses, so they may be read before gdc_wait.
    if norm is not None:
        residual_ptr, weight_ptr, total_ptr = norm
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    buffers = ()
    for rank in tl.static_range(SIZE):
        buffers = buffers + (_address(buffers_ptr, rank, tl.int16),)  # type: ignore[assignment]  # noqa: RUF005
    if PDL:
        gdc_wait()
    count = tl.load(count_ptr + row)
    part = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        part += tl.load(x_ptr + split * split_stride + row * x_stride + cols, mask=mask, other=0.0)
    mine = part.to(out_ptr.dtype.element_ty)
    stride = size * capacity.to(tl.int64)
    start = (count & 1) * SIZE * stride + row * size  # [parity, sender, row, column]
    own = buffers[RANK] + start + cols
    sent = start + RANK * stride + cols
    if TWO_SHOT:
        # Rank row % SIZE owns the row: the owner adds up the row and sends the sum to other ranks.
        owner = row % SIZE
        if owner == RANK:
            summed = _gathered(mine, own, stride, mask, RANK, SIZE).to(mine.dtype)
            for rank in tl.static_range(SIZE):
                if rank != RANK:
                    tl.store(buffers[rank] + sent, _cells(summed), mask=mask)
        else:
            tl.store(_address(buffers_ptr, owner, tl.int16) + sent, _cells(mine), mask=mask)
            got = _receive(own + owner * stride, mask, -32768)
            summed = got.to(mine.dtype, bitcast=True)
        x = summed.to(tl.float32)
    else:
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                tl.store(buffers[rank] + sent, _cells(mine), mask=mask)
        x = _gathered(mine, own, stride, mask, RANK, SIZE)
    tl.store(count_ptr + row, count + 1)
    if norm is not None:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        # The total is rounded before the norm, so that the norm uses exactly the stored values.
        total = (x + residual.to(tl.float32)).to(residual.dtype)
        tl.store(total_ptr + row * size + cols, total, mask=mask)
        x = total.to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps) * weight
    tl.store(out_ptr + row * size + cols, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _max_kernel(
    x_ptr,
    out_ptr,
    buffers_ptr,
    count_ptr,
    offset,
    count,
    capacity,
    BLOCK: tl.constexpr,
    EMPTY: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    best = tl.maximum(tl.load(x_ptr + index, mask=mask, other=0), EMPTY + 1)
    exchanges = tl.load(count_ptr + tl.program_id(0))
    start = offset + (exchanges & 1) * SIZE * capacity + index  # in [parity, sender, element]
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            peer = _address(buffers_ptr, rank, tl.int64)
            tl.store(peer + start + RANK * capacity, best, mask=mask)
    own = _address(buffers_ptr, RANK, tl.int64) + start
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            best = tl.maximum(best, _receive(own + rank * capacity, mask, EMPTY))
    tl.store(count_ptr + tl.program_id(0), exchanges + 1)
    tl.store(out_ptr + index, best, mask=mask)


@dataclass(eq=False, kw_only=True)
class PeerExchange:
    """Computes sums and maxima over ranks. Each rank has its own `PeerExchange`.

    All ranks must make the same calls with the same shapes in the same order, each on one stream.
    """

    rank: int
    # Addresses of all ranks' memories, as mapped on this device. Each memory has `num_words(...)`
    # int64 elements. `empty` must have emptied all memories before any rank's first exchange.
    addresses: Sequence[int]
    rows: int  # maximum number of rows of a sum
    width: int  # number of elements per row, a multiple of 8
    dtype: torch.dtype  # bf16 or fp16
    device: torch.device
    pdl: bool  # whether to use programmatic dependent launch (compute capability 9.0 or later)
    # While this event is set, kernels are compiled but do not run, and all results are zeros.
    rehearses: Event = field(default_factory=Event)
    two_shot_bytes: int = _TWO_SHOT_BYTES

    def __post_init__(self) -> None:
        self._size = len(self.addresses)
        self._buffers = torch.tensor(self.addresses, dtype=torch.int64, device=self.device)
        # Number of exchanges that each program of `_sum_kernel` and of `_max_kernel` has done.
        self._sums = torch.zeros(self.rows, dtype=torch.int32, device=self.device)
        programs = triton.cdiv(self.rows, _MAX_BLOCK)
        self._maxima = torch.zeros(programs, dtype=torch.int32, device=self.device)

    @staticmethod
    def num_words(size: int, rows: int, width: int) -> int:
        """Return the size of each rank's memory, in int64 elements, for `size` ranks."""
        return 2 * size * rows * (width // 4 + 1)

    @staticmethod
    def empty(memory: Tensor, size: int, rows: int) -> None:
        """Mark all cells of a rank's memory as empty."""
        maxima = memory.numel() - 2 * size * rows
        memory[:maxima].view(torch.int16).fill_(torch.iinfo(torch.int16).min)
        memory[maxima:].fill_(_EMPTY_MAX)

    def takes_sum(self, x: Tensor) -> bool:
        dtype = self.dtype if x.dim() == 2 else torch.float32
        fits = 0 < x.shape[-2] <= self.rows and x.shape[-1] == self.width
        return fits and x.stride(-1) == 1 and x.dtype == dtype

    def takes_max(self, x: Tensor) -> bool:
        return 0 < x.numel() <= self.rows and x.dtype == torch.int64 and x.is_contiguous()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of x [T, width], or of S float32 summands [S, T, width]."""
        out = self._made(x.shape[-2:], self.dtype)
        self._sum(x, None, out, 0.0)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return ``rowwise.rms_norm(residual, weight, eps, all_reduce(x))``, from one kernel."""
        out, total = (self._made(residual.shape, residual.dtype) for _ in range(2))
        self._sum(x, (residual, weight, total), out, eps)
        return out, total

    def all_max(self, x: Tensor) -> Tensor:
        """Return the maximum over ranks of each element of int64 x [N], at least -2**63 + 1."""
        out, count = self._made(x.shape, x.dtype), x.numel()
        cells = 2 * self._size * self.rows * (self.width // 4)
        self._launch(
            *(_max_kernel, triton.cdiv(count, _MAX_BLOCK)),
            *(x, out, self._buffers, self._maxima, cells, count, self.rows),
            *(_MAX_BLOCK, _EMPTY_MAX),
            num_warps=2,
        )
        return out

    def two_shot(self, rows: int) -> bool:
        """Return whether a sum takes two shots: each row is summed by one rank, then sent."""
        return self._size > 2 and rows * self.width * 2 > self.two_shot_bytes

    def _made(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Allocate a kernel's output: zeros while `rehearses` is set, since no kernel runs then."""
        make = torch.zeros if self.rehearses.is_set() else torch.empty
        return make(shape, dtype=dtype, device=self.device)

    def _sum(
        self, x: Tensor, norm: tuple[Tensor, Tensor, Tensor] | None, out: Tensor, eps: float
    ) -> None:
        """Launch `_sum_kernel`; `norm` is (residual, weight, tensor for residual + sum) or None."""
        rows, splits, split_stride = x.shape[-2], 1, 0
        if x.dim() == 3:
            splits, split_stride = x.shape[0], x.stride(0)
        strides = (x.stride(-2), split_stride, norm[0].stride(0) if norm else 0)
        self._launch(
            *(_sum_kernel, rows),
            *(x, norm, out, self._buffers, self._sums, strides, self.width, self.rows, eps),
            *(splits, self.two_shot(rows), triton.next_power_of_2(self.width)),
            num_warps=warps_of_row(self.width),
        )

    def _launch(self, kernel: Any, programs: int, *args: Any, num_warps: int) -> None:
        launch = kernel[(programs,)]
        if self.rehearses.is_set():
            launch = functools.partial(kernel.warmup, grid=(programs,))
        options = {"num_warps": num_warps, "launch_pdl": self.pdl}
        launch(*args, self.rank, self._size, self.pdl, **options)
