"""Embedding, linear layers and output head, which know their share of a tensor-parallel group.

Embedding and head divide the vocabulary over ranks, column-parallel layers their outputs and
row-parallel ones their inputs (Shoeybi et al., Megatron-LM, 2019). Each layer multiplies by a
`Matmul`: with the norm, gate or residual around the product, by the fastest means of the device.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.cpu_linear import HalfLinear
from layers.kernels.launch import has_wgmma
from layers.norm_rope import Normed, RMSNorm, Stream
from layers.parallel import Place
from utils.loader import WeightTarget

# The kernels for small batches make outputs in multiples of this, the sampler's noise of 4.
_ROWS = 16
# Rows that oneDNN is told to expect when it lays out a weight; 16 and 256 do as well at any batch.
_PACK_ROWS = 64


class _Linear:
    """This rank's weight [rows, columns] and bias [rows], and the product with them."""

    def __init__(self, rows: int, columns: int, *, bias: bool, place: Place) -> None:
        self._place = place
        self.weight: Tensor | None = place.empty(rows, columns)
        self.bias = place.empty(rows) if bias else None
        self._matmul: Matmul

    def prepare(self, norm: RMSNorm | None = None) -> None:
        """Lay the loaded weights out, and keep only that copy; for `norm` see `make_matmul`."""
        assert self.weight is not None
        self._matmul, self.weight = make_matmul(self.weight, self.bias, self._place, norm), None


class ColumnLinear(_Linear):
    """Several projections of one input, their weights one below the other, so one product.

    Args:
        sizes: output features of each part, over all ranks.
        shares: this rank's first output feature and number of them in each part; by default equal.
    """

    def __init__(
        self,
        input_size: int,
        sizes: tuple[int, ...],
        *,
        bias: bool,
        place: Place,
        shares: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        if shares is None:
            lengths = [place.parallel.per_rank("output features", size) for size in sizes]
            shares = tuple((place.parallel.rank * n, n) for n in lengths)
        self._full = [(size, input_size) for size in sizes]
        self._shares = shares
        super().__init__(sum(n for _, n in shares), input_size, bias=bias, place=place)

    def __call__(self, normed: Normed, *, partial: bool = False) -> tuple[Tensor, Stream]:
        """This rank's parts side by side, and the stream as its sum; see `Matmul.normed`."""
        return self._matmul.normed(normed, partial=partial)

    def gated(self, normed: Normed) -> tuple[Tensor, Stream]:
        """As a call, with silu(first part) * second part instead of the two parts."""
        return self._matmul.gated(normed)

    def weight_targets(self, *names: str) -> dict[str, WeightTarget]:
        """Targets of the checkpoint's layers `names`, one per part, in order."""
        slots, row = dict[str, WeightTarget](), 0
        for name, full, (start, length) in zip(names, self._full, self._shares, strict=True):
            for kind, shape in (("weight", full), ("bias", full[:1])):
                param = getattr(self, kind)
                if param is not None:
                    target = param[row : row + length]
                    slots[f"{name}.{kind}"] = WeightTarget(target, shape, 0, start, length)
            row += length
        return slots


class QKVLinear(ColumnLinear):
    """Query, key and value projections of so many heads over all ranks."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        place: Place,
    ) -> None:
        q = place.parallel.per_rank("query heads", num_heads) * head_dim
        first, count = place.parallel.kv_heads(num_kv_heads)
        kv = (first * head_dim, count * head_dim)
        sizes = (num_heads * head_dim, *[num_kv_heads * head_dim] * 2)
        shares = ((place.parallel.rank * q, q), kv, kv)
        super().__init__(hidden_size, sizes, bias=bias, place=place, shares=shares)


class RowLinear(_Linear):
    """A projection onto the residual stream, its inputs divided over the ranks."""

    def __init__(self, input_size: int, output_size: int, *, bias: bool, place: Place) -> None:
        self._full = (output_size, input_size)
        self._columns = place.parallel.per_rank("input features", input_size)
        super().__init__(output_size, self._columns, bias=bias, place=place)

    def prepare(self, norm: RMSNorm | None = None) -> None:
        if self._place.parallel.rank > 0:
            # The bias enters the sum over ranks once.
            self.bias = None
        super().prepare(norm)

    def __call__(self, x: Tensor, stream: Stream) -> Stream:
        """Add the projection of x [T, this rank's inputs] to a stream whose part is None."""
        return self._matmul.added(x, stream)

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        assert self.weight is not None
        start = self._place.parallel.rank * self._columns
        slots = {f"{name}.weight": WeightTarget(self.weight, self._full, 1, start, self._columns)}
        if self.bias is not None:
            slots[f"{name}.bias"] = WeightTarget(self.bias, self._full[:1])
        return slots


class VocabEmbedding:
    """Token ids to vectors, by a table with one row a token and as many rows on every rank.

    Of this rank's rows those from `length` on are padding, and zero.
    """

    def __init__(self, vocab_size: int, hidden_size: int, place: Place) -> None:
        self._parallel = parallel = place.parallel
        unit = _ROWS if parallel.size > 1 else 1
        rows = -(-vocab_size // (parallel.size * unit)) * unit
        self._shape = (vocab_size, hidden_size)
        self._start = parallel.rank * rows
        self.length = max(0, min(rows, vocab_size - self._start))
        self.weight = place.empty(rows, hidden_size).zero_()

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, hidden_size]."""
        if self._parallel.size == 1:
            return self.weight.index_select(0, token_ids)
        local = token_ids - self._start
        mine = (local >= 0) & (local < self.weight.shape[0])
        rows = self.weight.index_select(0, local * mine)
        return self._parallel.all_reduce(rows * mine.unsqueeze(-1))

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        start, target = min(self._start, self._shape[0]), self.weight[: self.length]
        return {f"{name}.weight": WeightTarget(target, self._shape, 0, start, self.length)}


class VocabHead:
    """The projection of normalised hidden states to logits, by an embedding's table."""

    def __init__(self, table: VocabEmbedding, place: Place) -> None:
        self._table = table
        self._place = place
        self._matmul: Matmul

    def prepare(self, norm: RMSNorm) -> None:
        self._matmul = make_matmul(self._table.weight, None, self._place, norm)

    def __call__(self, normed: Normed, out: Tensor | None = None) -> Tensor:
        """Logits [R, this rank's rows], in `out` if it is given; those of padding are -inf."""
        logits = self._matmul.normed(normed, out=out)[0]
        length = self._table.length
        if length < logits.shape[1]:
            logits[:, length:] = float("-inf")
        return logits


class Matmul:
    """x W^T + b through torch for W [N, K] and b [N], nothing fused: the reference."""

    def __init__(self, weight: Tensor, bias: Tensor | None, place: Place) -> None:
        self.weight = weight
        self._bias = bias
        self._place = place

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N], in `out` if it is given."""
        y = F.linear(x, self.weight, self._bias)
        return y if out is None else out.copy_(y)

    def partial(self, x: Tensor) -> Tensor:
        """As a call, or [S, T, N] float32 where kernels are fused, for the reader to add up."""
        return self(x)

    def added(self, x: Tensor, stream: Stream) -> Stream:
        """Add the product of x [T, K], of several ranks this one's share, to `stream.total`."""
        return Stream(stream.total, self.partial(x))

    def normed(
        self, normed: Normed, *, partial: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Stream]:
        """The product of the normalised stream [T, N], and the stream as its sum.

        The product is in `out` if that is given, or may be left in partial sums, see `partial`.
        """
        x, stream = normed.norm.compute(normed.stream)
        return (self.partial(x) if partial else self(x, out)), stream

    def gated(self, normed: Normed) -> tuple[Tensor, Stream]:
        """As `normed`, for W = [gate; up]: silu(gate) * up [T, N / 2]."""
        y, stream = self.normed(normed)
        return silu_mul(y, self._place), stream


class CPUMatmul(Matmul):
    """For float32 on a CPU: oneDNN's blocked layout, or float16 for up to `few_rows` rows.

    Where `few_rows` is infinite, `weight` is empty. For `norm` see `make_matmul`.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, place: Place, norm: RMSNorm | None
    ) -> None:
        super().__init__(weight, bias, place)
        scale = None if norm is None else norm.take_scale()
        self._half = HalfLinear(weight, scale) if HalfLinear.holds(weight) else None
        self.few_rows = self._half.most_rows if self._half else 0
        if self.few_rows == math.inf:
            self.weight = weight.new_empty(0)
        else:
            folded = weight if scale is None else weight * scale
            self.weight = torch.ops.mkldnn._reorder_linear_weight(folded, _PACK_ROWS)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._adding = self._half if bias is None and place.parallel.size == 1 else None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self._half is None or x.shape[0] > self.few_rows:
            y: Tensor = self._multiply(x, self.weight, self._bias, "none", [], "")
        else:
            y = self._half(x) if self._bias is None else self._half(x) + self._bias
        return y if out is None else out.copy_(y)

    def added(self, x: Tensor, stream: Stream) -> Stream:
        if self._adding is None or x.shape[0] > self.few_rows:
            return super().added(x, stream)
        return Stream(self._adding.added(x, stream.total))


class SmallBatchMatmul(Matmul):
    """Our own kernels for up to 256 tokens on Hopper, cuBLAS beyond.

    Up to 16 tokens norm, gate and residual are part of the kernel. Beyond, the gate is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, place: Place) -> None:
        from layers.kernels import small_batch_linear as kernels

        super().__init__(weight, bias, place)
        self._kernels = kernels
        self._run = functools.partial(kernels.small_batch_linear, pdl=True)
        self._most_fused = kernels.MAX_FUSED_TOKENS

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self._fits(x.shape[0]):
            return self._run(x, self.weight, self._bias, out=out)
        if out is None or self._bias is not None:
            return super().__call__(x, out)
        # As F.linear without a bias.
        return torch.mm(x, self.weight.t(), out=out)

    def partial(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        if self._bias is None:
            splits = self._kernels.small_batch_splits(tokens, *self.weight.shape)
            if splits > 1 and self._fits(tokens, splits=splits):
                return self._run(x, self.weight, splits=splits)
        return self(x)

    def added(self, x: Tensor, stream: Stream) -> Stream:
        alone, tokens = self._place.parallel.size == 1, x.shape[0]
        if alone and tokens <= self._most_fused and self._fits(tokens):
            return Stream(self._run(x, self.weight, self._bias, residual=stream.total))
        return super().added(x, stream)

    def normed(
        self, normed: Normed, *, partial: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Stream]:
        if not self._fits(normed.stream.total.shape[0]):
            return super().normed(normed, partial=partial, out=out)
        # No partial sums: they are for where nothing else fills the device.
        x, stream, norm = self._input(normed)
        return self._run(x, self.weight, self._bias, out=out, **norm), stream

    def gated(self, normed: Normed) -> tuple[Tensor, Stream]:
        if self._bias is not None or not self._fits(normed.stream.total.shape[0], swiglu=True):
            return super().gated(normed)
        x, stream, norm = self._input(normed)
        return self._run(x, self.weight, swiglu=True, **norm), stream

    def _fits(self, tokens: int, *, swiglu: bool = False, splits: int = 1) -> bool:
        n, k = self.weight.shape[0] // (2 if swiglu else 1), self.weight.shape[1]
        supports = self._kernels.supports_small_batch_linear
        return supports(tokens, n, k, swiglu=swiglu, splits=splits)

    def _input(self, normed: Normed) -> tuple[Tensor, Stream, dict[str, Any]]:
        """The kernel's input, the stream as its sum, and the norm if the kernel computes it."""
        norm, stream = normed.norm, normed.stream
        x = stream.total
        # The kernel rounds inputs times the norm's weight before it scales the row, which float16
        # has no room for.
        fuses = x.shape[0] <= self._most_fused and x.dtype == torch.bfloat16
        if stream.part is None and fuses:
            return x, stream, {"norm_weight": norm.weight, "eps": norm.eps}
        return *norm.compute(stream), {}


def silu_mul(x: Tensor, place: Place) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020) of x = [gate | up]: [T, 2n] -> [T, n]."""
    if place.fused:
        from layers.kernels import rowwise

        return rowwise.silu_mul(x, pdl=place.pdl)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def make_matmul(
    weight: Tensor, bias: Tensor | None, place: Place, norm: RMSNorm | None = None
) -> Matmul:
    """The fastest product; it may take in the weight of a prepared norm that it alone reads."""
    if place.device.type == "cpu" and place.dtype == torch.float32 and torch._C._has_mkldnn:
        return CPUMatmul(weight, bias, place, norm)
    if place.fused and has_wgmma(place.device):
        return SmallBatchMatmul(weight, bias, place)
    return Matmul(weight, bias, place)
