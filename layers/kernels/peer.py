"""Sums and maxima over the devices of one host, through memory that all of them have mapped.

A sum is one kernel: every device writes its part into the others' memory and adds up what they
wrote into its own. An 8-byte word carries 4 bytes of data and the number of the exchange, so that
data and the news that it is there arrive in one trip: no fence, no barrier, no flag to reset. That
is the "low latency" protocol of NCCL (Hu et al. 2025, "Demystifying NCCL", arXiv:2507.04786); it
moves twice the bytes. The residual add and the RMSNorm that follow a sum are part of the kernel.

A program handles one row and counts its own exchanges. Even and odd ones have buffers of their own:
a device that writes exchange n + 2 has seen all others' words of n + 1, which they wrote after they
were done with n.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from layers.kernels.norm import _num_warps

__all__ = ["PeerExchange"]

# Elements that a program of the maximum takes.
_MAX_BLOCK = 64
# Sums of more than two ranks go in two shots from this size on.
_TWO_SHOT_BYTES = 256 << 10


@triton.jit
def _send(base, words, mask, data, number):
    """Write 32-bit data with the exchange's number."""
    tl.store(base + words, (data & 0xFFFFFFFF) | (number << 32), mask=mask)


@triton.jit
def _receive(base, words, mask, number):
    """Wait for a peer's words of this exchange; int64 with the data in the low half."""
    got = tl.load(base + words, mask=mask, other=0, volatile=True)
    while tl.sum((mask & ((got >> 32) != number)).to(tl.int32)) > 0:
        got = tl.load(base + words, mask=mask, other=0, volatile=True)
    return got


@triton.jit
def _packed(x):
    """[W, 2] of a 16-bit type -> [W] int64 of both."""
    low, high = tl.split(x.to(tl.int16, bitcast=True))
    return (low.to(tl.int64) & 0xFFFF) | ((high.to(tl.int64) & 0xFFFF) << 16)


@triton.jit
def _unpacked(words, dtype: tl.constexpr):
    """The reverse of `_packed`, as float32."""
    low = (words & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = ((words >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high).to(tl.float32)


@triton.jit
def _gathered(mine, own, stride, words, mask, number, RANK: tl.constexpr, SIZE: tl.constexpr):
    """The sum of all ranks' parts, in the order of ranks: the same bits on each."""
    total = tl.zeros_like(mine).to(tl.float32)
    for rank in tl.static_range(SIZE):
        if rank == RANK:
            total += mine.to(tl.float32)
        else:
            got = _receive(own + rank * stride, words, mask, number)
            total += _unpacked(got, mine.dtype)
    return total


@triton.jit
def _sum_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    buffers_ptr,
    count_ptr,
    x_stride,
    split_stride,
    residual_stride,
    size,
    capacity,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    words = tl.arange(0, WORDS)
    cols = words[:, None] * 2 + tl.arange(0, 2)[None, :]
    inside, mask = words * 2 < size, cols < size
    if PDL:
        gdc_launch_dependents()
    if NORM:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    number = tl.load(count_ptr + row).to(tl.int64) + 1
    part = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        part += tl.load(x_ptr + split * split_stride + row * x_stride + cols, mask=mask, other=0.0)
    mine = part.to(out_ptr.dtype.element_ty)
    # [parity, sender, row, word]
    stride = capacity.to(tl.int64) * (size // 2)
    start = (number & 1) * SIZE * stride + row * (size // 2)
    own = tl.load(buffers_ptr + RANK).to(tl.pointer_type(tl.int64)) + start
    packed = _packed(mine)
    if TWO_SHOT:
        # The rows are dealt out: a row's owner adds it up and sends the sum.
        owner = row % SIZE
        if owner == RANK:
            summed = _gathered(mine, own, stride, words, inside, number, RANK, SIZE)
            packed = _packed(summed.to(mine.dtype))
            for rank in tl.static_range(SIZE):
                if rank != RANK:
                    peer = tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.int64))
                    _send(peer + start + RANK * stride, words, inside, packed, number)
        else:
            peer = tl.load(buffers_ptr + owner).to(tl.pointer_type(tl.int64))
            _send(peer + start + RANK * stride, words, inside, packed, number)
            packed = _receive(own + owner * stride, words, inside, number)
        x = _unpacked(packed, mine.dtype)
    else:
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                peer = tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.int64))
                _send(peer + start + RANK * stride, words, inside, packed, number)
        x = _gathered(mine, own, stride, words, inside, number, RANK, SIZE)
    tl.store(count_ptr + row, number.to(tl.int32))
    if NORM:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        # Rounded before it is normalised: what is stored is what is normalised.
        total = (x + residual.to(tl.float32)).to(residual.dtype)
        tl.store(total_ptr + row * size + cols, total, mask=mask)
        x = total.to(tl.float32)
        square = tl.sum(tl.sum(x * x, axis=1), axis=0)
        x = x * tl.rsqrt(square / size + eps) * weight
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
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    best = tl.load(x_ptr + index, mask=mask, other=0)
    number = tl.load(count_ptr + tl.program_id(0)).to(tl.int64) + 1
    # [parity, sender, half, element]
    start = offset + (number & 1) * SIZE * 2 * capacity
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            peer = tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.int64))
            peer += start + RANK * 2 * capacity
            _send(peer, index, mask, best, number)
            _send(peer + capacity, index, mask, best >> 32, number)
    own = tl.load(buffers_ptr + RANK).to(tl.pointer_type(tl.int64)) + start
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            low = _receive(own + rank * 2 * capacity, index, mask, number)
            high = _receive(own + rank * 2 * capacity + capacity, index, mask, number)
            best = tl.maximum(best, (low & 0xFFFFFFFF) | (high << 32))
    tl.store(count_ptr + tl.program_id(0), number.to(tl.int32))
    tl.store(out_ptr + index, best, mask=mask)


class PeerExchange:
    """One rank's side of the exchange.

    Every rank makes the same calls with the same shapes in the same order, all on one stream.

    Args:
        rank: this one.
        addresses: of each rank's buffer of `num_words(...)` int64 zeros, as this device maps it.
        rows: most rows of a sum.
        width: elements of a row, even.
        dtype: bf16 or fp16.
        device: of this rank.
        pdl: launch with programmatic dependent launch (compute capability 9.0 and later).
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
    ) -> None:
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
        """int64 elements of a rank's buffer: two parities of a sum's and a maximum's words."""
        return 2 * size * rows * (width // 2 + 2)

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
        """The largest of each element of x [N] int64 over the ranks."""
        out, count = torch.zeros_like(x) if rehearse else torch.empty_like(x), x.numel()
        self._launch(
            _max_kernel,
            triton.cdiv(count, _MAX_BLOCK),
            rehearse,
            x,
            out,
            self._buffers,
            self._maxima,
            2 * self._size * self._rows * (self._width // 2),
            count,
            self._rows,
            RANK=self._rank,
            SIZE=self._size,
            BLOCK=_MAX_BLOCK,
            num_warps=2,
        )
        return out

    def two_shot(self, rows: int) -> bool:
        """Whether rows are added up by one rank each instead of by all.

        That sends (size - 1) / size of the rows twice instead of size - 1 times once.
        """
        return self._size > 2 and rows * self._width * 2 > _TWO_SHOT_BYTES

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
        self._launch(
            _sum_kernel,
            rows,
            rehearse,
            x,
            residual,
            weight,
            out,
            total,
            self._buffers,
            self._sums,
            x.stride(-2),
            x.stride(0) if x.dim() == 3 else 0,
            residual.stride(0),
            self._width,
            self._rows,
            eps,
            RANK=self._rank,
            SIZE=self._size,
            SPLITS=x.shape[0] if x.dim() == 3 else 1,
            NORM=norm is not None,
            TWO_SHOT=self.two_shot(rows),
            WORDS=triton.next_power_of_2(self._width) // 2,
            num_warps=_num_warps(self._width),
        )

    def _launch(
        self, kernel: Any, programs: int, rehearse: bool, *args: Any, **options: Any
    ) -> None:
        options |= {"PDL": self._pdl, "launch_pdl": self._pdl}
        if rehearse:
            kernel.warmup(*args, grid=(programs,), **options)
        else:
            kernel[(programs,)](*args, **options)
