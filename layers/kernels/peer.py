"""Sums and maxima over the devices of one host, through memory that all of them have mapped.

A sum is one kernel: every device writes its part into the others' memory and adds up what they
wrote into its own. A cell that holds a value no part can have, -0, is empty: the reader waits until
its cells are full, and empties them again. Data and the news that it is there arrive in one trip
then, without fence, barrier or flag; TensorRT-LLM's "Lamport" all-reduce works that way. The
residual add and the RMSNorm that follow a sum are part of the kernel.

A program handles one row and counts its own exchanges. Even and odd ones have cells of their own:
a device that writes for exchange n + 2 has seen what the others wrote for n + 1, after they had
emptied the cells of n.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from layers.kernels.norm import warps_of_row

__all__ = ["PeerExchange"]

# An empty cell of a maximum; the least value counts as one more.
_EMPTY_MAX = torch.iinfo(torch.int64).min
# Elements that a program of the maximum takes.
_MAX_BLOCK = 64
# Sums of more than two ranks go in two shots beyond this size. Four H200, 60 sums in a graph, us a
# sum with residual and norm, in one shot and in two, NCCL's sum with a norm of its own in brackets:
# ===========================  ==================  ==================
# rows                         width 1,024         width 4,096
# ===========================  ==================  ==================
# 1                            3.6, 4.6 (10.9)     4.9, 6.5 (10.9)
# 24                           4.0, 5.5 (12.7)     6.5, 7.1 (12.4)
# 64                           4.9, 5.3 (12.9)     9.7, 8.3 (15.6)
# 128                          5.9, 5.9 (12.6)     15.2, 10.2 (19.5)
# 256                          8.7, 6.8 (15.6)     24.2, 14.6 (29.0)
# ===========================  ==================  ==================
# Two H200: 2.6 to 4.4 (7.2 to 11.4) and 3.4 to 9.7 (8.0 to 29.4). The norm alone takes 0.9 to 2.8.
# Words of 4 bytes of data and 4 of a sequence number, NCCL's "low latency" protocol, took as long
# for small sums and 15.1 instead of 10.2 at 128 x 4,096. (All of it one peer after the other; they
# are waited for together since, which is not measured.)
_TWO_SHOT_BYTES = 256 << 10


@triton.jit
def _address(buffers_ptr, rank, dtype: tl.constexpr):
    """Start of a rank's memory."""
    return tl.multiple_of(tl.load(buffers_ptr + rank).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _receive(ptr, mask, empty):
    """Wait until peers have filled the cells, and empty them."""
    got = tl.load(ptr, mask=mask, other=0, volatile=True)
    while tl.sum(((got == empty) & mask).to(tl.int32)) > 0:
        got = tl.load(ptr, mask=mask, other=0, volatile=True)
    tl.store(ptr, tl.zeros_like(got) + empty, mask=mask)
    return got


@triton.jit
def _cells(x):
    """A 16-bit float as what is sent: its bits, +0 for -0."""
    bits = x.to(tl.int16, bitcast=True)
    return tl.where(bits == -32768, 0, bits).to(tl.int16)


@triton.jit
def _gathered(mine, own, stride, mask, RANK: tl.constexpr, SIZE: tl.constexpr):
    """The sum of all ranks' parts, in the order of ranks: the same bits on each."""
    rank = tl.arange(0, triton.next_power_of_2(SIZE))[:, None]
    theirs = (rank != RANK) & (rank < SIZE) & mask[None, :]
    # All at once: one after the other each peer would cost the latency of another read.
    got = _receive(own[None, :] + rank * stride, theirs, -32768)
    bits = tl.where(rank == RANK, mine.to(tl.int16, bitcast=True)[None, :], got)
    return tl.sum(bits.to(mine.dtype, bitcast=True).to(tl.float32), axis=0)


@triton.jit
def _sum_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    buffers_ptr,
    count_ptr,
    x_strides,
    residual_stride,
    size,
    capacity,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    x_stride, split_stride = x_strides
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    if PDL:
        gdc_launch_dependents()
    # What never changes may be read before the wait.
    if NORM:
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
    # [parity, sender, row, column]
    stride = size * capacity.to(tl.int64)
    start = (count & 1) * SIZE * stride + row * size
    own = buffers[RANK] + start + cols
    sent = start + RANK * stride + cols
    if TWO_SHOT:
        # The rows are dealt out: a row's owner adds it up and sends the sum.
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
    if NORM:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        # Rounded before it is normalised: what is stored is what is normalised.
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
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EMPTY: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    best = tl.maximum(tl.load(x_ptr + index, mask=mask, other=0), EMPTY + 1)
    exchanges = tl.load(count_ptr + tl.program_id(0))
    # [parity, sender, element]
    start = offset + (exchanges & 1) * SIZE * capacity + index
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


class PeerExchange:
    """One rank's side of the exchange.

    Every rank makes the same calls with the same shapes in the same order, all on one stream.

    Args:
        rank: this one.
        addresses: of each rank's memory as this device maps it: `num_words(...)` int64 that were
            emptied before any rank exchanges anything.
        rows: most rows of a sum.
        width: elements of a row, a multiple of 8.
        dtype: bf16 or fp16.
        device: of this rank.
        pdl: launch with programmatic dependent launch (compute capability 9.0 and later).
        two_shot_bytes: see `two_shot`.
    """

    def __init__(
        self,
        rank: int,
        addresses: Sequence[int],
        *,
        rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        pdl: bool,
        two_shot_bytes: int = _TWO_SHOT_BYTES,
    ) -> None:
        self._two_shot_bytes = two_shot_bytes
        self._rank = rank
        self._size = len(addresses)
        self._rows = rows
        self._width = width
        self._dtype = dtype
        self._pdl = pdl
        self._buffers = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._sums = torch.zeros(rows, dtype=torch.int32, device=device)
        self._maxima = torch.zeros(-(-rows // _MAX_BLOCK), dtype=torch.int32, device=device)

    @staticmethod
    def num_words(size: int, rows: int, width: int) -> int:
        """int64 elements of a rank's memory: two parities of a sum's and a maximum's cells."""
        return 2 * size * rows * (width // 4 + 1)

    @staticmethod
    def empty(memory: torch.Tensor, size: int, rows: int) -> None:
        """Empty all cells of a rank's memory."""
        maxima = memory.numel() - 2 * size * rows
        memory[:maxima].view(torch.int16).fill_(torch.iinfo(torch.int16).min)
        memory[maxima:].fill_(_EMPTY_MAX)

    def takes_sum(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce` and `add_rms_norm` take x."""
        return (
            0 < x.shape[-2] <= self._rows
            and x.shape[-1] == self._width
            and x.stride(-1) == 1
            and x.dtype == (self._dtype if x.dim() == 2 else torch.float32)
        )

    def takes_max(self, x: torch.Tensor) -> bool:
        """Whether `all_max` takes x."""
        return 0 < x.numel() <= self._rows and x.dtype == torch.int64 and x.is_contiguous()

    def all_reduce(self, x: torch.Tensor, *, rehearse: bool = False) -> torch.Tensor:
        """The sum over ranks of x [T, width], or of partial sums [S, T, width] in float32.

        Every part is rounded to the exchange's dtype before it is sent.

        Args:
            rehearse: compile the kernel and return zeros.
        """
        out = torch.empty(x.shape[-2:], dtype=self._dtype, device=x.device)
        self._sum(x, out, None, 0.0, rehearse)
        return out

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        rehearse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(rms_norm(s, weight, eps), s)`` with ``s = all_reduce(x) + residual``.

        For shapes see :func:`layers.kernels.norm.add_rms_norm`, for `rehearse` `all_reduce`.
        """
        shape, dtype, device = residual.shape, residual.dtype, residual.device
        out, total = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self._sum(x, out, (residual, weight, total), eps, rehearse)
        return out, total

    def all_max(self, x: torch.Tensor, *, rehearse: bool = False) -> torch.Tensor:
        """The largest of each element of x [N] int64 over the ranks; above the least int64."""
        out, count = torch.zeros_like(x) if rehearse else torch.empty_like(x), x.numel()
        cells = 2 * self._size * self._rows * (self._width // 4)
        self._launch(
            _max_kernel,
            triton.cdiv(count, _MAX_BLOCK),
            rehearse,
            *(x, out, self._buffers, self._maxima, cells, count, self._rows),
            BLOCK=_MAX_BLOCK,
            EMPTY=_EMPTY_MAX,
            num_warps=2,
        )
        return out

    def two_shot(self, rows: int) -> bool:
        """Whether rows are added up by one rank each instead of by all.

        That sends (size - 1) / size of the rows twice instead of size - 1 times once.
        """
        return self._size > 2 and rows * self._width * 2 > self._two_shot_bytes

    def _sum(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
        eps: float,
        rehearse: bool,
    ) -> None:
        """Launch the sum; `norm` is residual, weight and where the stream's sum goes."""
        residual, weight, total = norm or (out, out, out)
        rows = x.shape[-2]
        if rehearse:
            out.zero_()
            total.zero_()
        splits, split_stride = (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)
        self._launch(
            _sum_kernel,
            rows,
            rehearse,
            *(x, residual, weight, out, total, self._buffers, self._sums),
            *((x.stride(-2), split_stride), residual.stride(0), self._width, self._rows, eps),
            SPLITS=splits,
            NORM=norm is not None,
            TWO_SHOT=self.two_shot(rows),
            BLOCK=triton.next_power_of_2(self._width),
            num_warps=warps_of_row(self._width),
        )

    def _launch(
        self, kernel: Any, programs: int, rehearse: bool, *args: Any, **options: Any
    ) -> None:
        options |= {"RANK": self._rank, "SIZE": self._size}
        options |= {"PDL": self._pdl, "launch_pdl": self._pdl}
        if rehearse:
            kernel.warmup(*args, grid=(programs,), **options)
        else:
            kernel[(programs,)](*args, **options)
