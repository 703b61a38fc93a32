"""Sums and maxima over the ranks (GPUs) of one host.

Each rank has an *exchange buffer*: memory on its GPU to which the other ranks, its peers, write. A
*cell* of the buffer is the place for one value of one peer. In a sum, a cell is empty if it holds
-0, so senders replace -0 by +0. A rank waits until its cells are full, reads the values and marks
the cells as empty again. So a rank needs no fence, barrier or flag to know that the values of its
peers have arrived. TensorRT-LLM's "Lamport" all-reduce works in the same way.

A sum adds up one matrix per rank; each Triton program handles one row. Its bits are defined by
`layers.parallel.ordered_sum`: parts are rounded to 16 bits and added in float32 in ascending order
of rank, and the sum is rounded to 16 bits. So they do not depend on the number of shots, nor on
whether this exchange or NCCL carries the parts. A maximum is taken elementwise over one vector per
rank; each program handles 64 elements.

In an *exchange*, program i of every rank sends values to program i of its peers. Even and odd
exchanges use separate cells, so exchange n + 2 reuses the cells of exchange n. These cells are
empty by then: a rank starts exchange n + 2 only after all its peers have sent their values of
exchange n + 1. A peer sends these values only after it has emptied its cells of exchange n.
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

from layers.kernels.rowwise import normed, sum_parts, warps_of_row
from layers.norm_rope import GAIN

_EMPTY_MAX = torch.iinfo(torch.int64).min  # value of an empty cell in a maximum; never sent
_MAX_BLOCK = 64  # number of elements that each program of `_max_kernel` handles
# With one shot every rank adds up all rows. With two shots the ranks divide the rows: each rank
# adds up its share of the rows and sends these sums to the other ranks. A sum takes two shots if
# there are more than two ranks and the sum has more than _TWO_SHOT_BYTES bytes. On four H200 a sum
# [64, 1024], with residual addition and RMSNorm, takes 4.9 us with one shot, 5.3 us with two shots
# and 12.9 us with NCCL. For a sum [256, 1024] these times are 8.7 us, 6.8 us and 15.6 us.
_TWO_SHOT_BYTES = 256 << 10


@triton.jit
def _address(buffers_ptr, rank, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(buffers_ptr + rank).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _receive(ptr, mask, empty):
    """Wait until the cells that `mask` selects are full, mark them as empty, return the values."""
    got = tl.load(ptr, mask=mask, other=0, volatile=True)
    while tl.sum(((got == empty) & mask).to(tl.int32)) > 0:
        got = tl.load(ptr, mask=mask, other=0, volatile=True)
    tl.store(ptr, tl.zeros_like(got) + empty, mask=mask)
    return got


@triton.jit
def _cells(x):
    """Return the bits of 16-bit floats x, after replacing -0, which means an empty cell, by +0."""
    bits = x.to(tl.int16, bitcast=True)
    return tl.where(bits == -32768, 0, bits).to(tl.int16)


@triton.jit
def _gathered(mine, own, stride, mask, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Return the sum of one row over all ranks, in float32 and in order of rank, then rounded."""
    rank = tl.arange(0, triton.next_power_of_2(SIZE))[:, None]
    theirs = (rank != RANK) & (rank < SIZE) & mask[None, :]
    # One load reads the values of all peers, because the latencies of several loads would add up.
    got = _receive(own[None, :] + rank * stride, theirs, -32768)
    # From +0, so that no sum is -0: peers' zeros of both signs arrive as +0.
    total = tl.zeros(mine.shape, dtype=tl.float32)
    for peer in tl.static_range(SIZE):
        part = mine
        if peer != RANK:
            # `tl.sum` of floats would add the ranks in an order that follows the layout, which
            # depends on width and number of warps. Here it picks a row: all other integers are 0.
            bits = tl.sum(tl.where(rank == peer, got, 0).to(tl.int32), axis=0)
            part = bits.to(tl.int16).to(mine.dtype, bitcast=True)
        total += part.to(tl.float32)
    return total.to(mine.dtype)


@triton.jit
def _sum_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    total_ptr,
    squares_ptr,
    out_ptr,
    buffers_ptr,
    count_ptr,
    strides,
    size,
    capacity,
    eps,
    GAIN: tl.constexpr,
    PARTS: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    LOG: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    x_stride, part_stride, residual_stride = strides
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, 2**LOG)
    mask = cols < size
    if PDL:
        gdc_launch_dependents()
    # No earlier kernel writes the norm's weight or the table of buffer addresses, so load these
    # before gdc_wait waits for earlier kernels.
    if residual_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    buffers = ()
    for rank in tl.static_range(SIZE):
        buffers = buffers + (_address(buffers_ptr, rank, tl.int16),)  # type: ignore[assignment]  # noqa: RUF005
    if PDL:
        gdc_wait()
    count = tl.load(count_ptr + row)
    part = sum_parts(x_ptr + row * x_stride + cols, part_stride, mask, PARTS)
    mine = part.to(out_ptr.dtype.element_ty)
    stride = size * capacity.to(tl.int64)
    start = (count & 1) * SIZE * stride + row * size  # [parity, sender, row, column]
    own = buffers[RANK] + start + cols
    sent = start + RANK * stride + cols
    if TWO_SHOT:
        # Rank `row % SIZE` is the owner: it adds up this row and sends the sum to its peers.
        owner = row % SIZE
        if owner == RANK:
            summed = _gathered(mine, own, stride, mask, RANK, SIZE)
            for rank in tl.static_range(SIZE):
                if rank != RANK:
                    tl.store(buffers[rank] + sent, _cells(summed), mask=mask)
        else:
            tl.store(_address(buffers_ptr, owner, tl.int16) + sent, _cells(mine), mask=mask)
            got = _receive(own + owner * stride, mask, -32768)
            summed = got.to(mine.dtype, bitcast=True)
    else:
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                tl.store(buffers[rank] + sent, _cells(mine), mask=mask)
        summed = _gathered(mine, own, stride, mask, RANK, SIZE)
    tl.store(count_ptr + row, count + 1)
    # The sum is rounded before the residual is added, as if another kernel added the residual.
    x = summed.to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(residual.dtype)
        tl.store(total_ptr + row * size + cols, total, mask=mask)
        if squares_ptr is not None:
            squares_ptr += row
        x = normed(total, weight, size, eps, squares_ptr, GAIN, LOG)
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
    """Computes sums and maxima over ranks. A rank must make all calls on one CUDA stream.

    All ranks must call the same methods in the same order, with tensors of the same shapes.
    """

    rank: int
    # Addresses through which this GPU accesses the exchange buffers, one per rank. A buffer has
    # `num_words(...)` int64 elements. All ranks must call `empty` before the first exchange.
    addresses: Sequence[int]
    rows: int  # most rows of a matrix in a sum, and most elements of a vector in a maximum
    width: int  # number of columns of a matrix, a multiple of 8
    dtype: torch.dtype  # bf16 or fp16
    device: torch.device
    pdl: bool  # use CUDA's programmatic dependent launch (compute capability 9.0 or later)
    # While this event is set, methods for sums and maxima only compile kernels and return zeros.
    rehearses: Event = field(default_factory=Event)
    two_shot_bytes: int = _TWO_SHOT_BYTES

    def __post_init__(self) -> None:
        self._size = len(self.addresses)
        self._buffers = torch.tensor(self.addresses, dtype=torch.int64, device=self.device)
        # `_sums[i]` counts exchanges of program i of `_sum_kernel`, `_maxima[i]` of `_max_kernel`.
        self._sums = torch.zeros(self.rows, dtype=torch.int32, device=self.device)
        programs = triton.cdiv(self.rows, _MAX_BLOCK)
        self._maxima = torch.zeros(programs, dtype=torch.int32, device=self.device)

    @staticmethod
    def num_words(size: int, rows: int, width: int) -> int:
        """Return the number of int64 elements of an exchange buffer if there are `size` ranks."""
        return 2 * size * rows * (width // 4 + 1)

    @staticmethod
    def empty(memory: Tensor, size: int, rows: int) -> None:
        """Mark all cells of the exchange buffer `memory` as empty."""
        maxima = memory.numel() - 2 * size * rows
        memory[:maxima].view(torch.int16).fill_(torch.iinfo(torch.int16).min)
        memory[maxima:].fill_(_EMPTY_MAX)

    def takes_sum(self, x: Tensor) -> bool:
        if x.dim() == 3 and x.shape[0] not in (2, 4):
            return False
        dtype = self.dtype if x.dim() == 2 else torch.float32
        fits = 0 < x.shape[-2] <= self.rows and x.shape[-1] == self.width
        return fits and x.stride(-1) == 1 and x.dtype == dtype

    def takes_max(self, x: Tensor) -> bool:
        return 0 < x.numel() <= self.rows and x.dtype == torch.int64 and x.is_contiguous()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of x [T, width], or of S summands: float32 x [S, T, width]."""
        out = self._made(x.shape[-2:], self.dtype)
        self._sum(x, None, out, 0.0)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, gained: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute ``rowwise.rms_norm(residual, weight, eps, all_reduce(x))`` in one kernel.

        If `gained`, compute ``rowwise.gain_rows(residual, weight, all_reduce(x))``, of which the
        second result is returned last.
        """
        out, total = (self._made(residual.shape, residual.dtype) for _ in range(2))
        squares = self._made(torch.Size((1, len(residual))), torch.float32) if gained else None
        self._sum(x, (residual, weight, total, squares), out, eps)
        return out, total, squares

    def all_max(self, x: Tensor) -> Tensor:
        """Return each element's maximum over ranks for int64 x [N]. -2**63 becomes -2**63 + 1."""
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
        return self._size > 2 and rows * self.width * 2 > self.two_shot_bytes

    def _made(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        make = torch.zeros if self.rehearses.is_set() else torch.empty
        return make(shape, dtype=dtype, device=self.device)

    def _sum(
        self,
        x: Tensor,
        norm: tuple[Tensor, Tensor, Tensor, Tensor | None] | None,
        out: Tensor,
        eps: float,
    ) -> None:
        """Launch `_sum_kernel`. `norm`: residual, norm weight, and outputs for sum and squares."""
        rows, parts, part_stride = x.shape[-2], 1, 0
        if x.dim() == 3:
            parts, part_stride = x.shape[0], x.stride(0)
        strides = (x.stride(-2), part_stride, norm[0].stride(0) if norm else 0)
        self._launch(
            *(_sum_kernel, rows),
            *(x, *(norm or [None] * 4), out, self._buffers, self._sums, strides),
            *(self.width, self.rows, eps),
            *(GAIN.get(self.dtype, 1.0), parts, self.two_shot(rows), (self.width - 1).bit_length()),
            num_warps=warps_of_row(self.width),
        )

    def _launch(self, kernel: Any, programs: int, *args: Any, num_warps: int) -> None:
        launch = kernel[(programs,)]
        if self.rehearses.is_set():
            launch = functools.partial(kernel.warmup, grid=(programs,))
        options = {"num_warps": num_warps, "launch_pdl": self.pdl}
        launch(*args, self.rank, self._size, self.pdl, **options)
