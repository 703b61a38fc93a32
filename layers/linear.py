"""Embedding, linear layers and output head. Each rank holds only its share of the weights.

The embedding and the head divide the vocabulary over ranks. A `ColumnLinear` divides its output
features, a `RowLinear` its input features (Shoeybi et al., Megatron-LM, 2019). Layers compute
x W^T + b by a `Matmul`, which may fuse this product with the norm before it, with the gate of an
MLP, or with the addition to the residual stream. The residual stream is a `Stream` of two tensors:
`part`, the output of the last attention or MLP, is still to be added to `total`. Layers that take a
`Normed` (a stream and its norm) also return the stream with part added: a new total, and no part.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.cpu_linear import HalfLinear
from layers.kernels.launch import has_wgmma
from layers.norm_rope import Normed, RMSNorm, Stream
from layers.parallel import Place
from utils.loader import WeightTarget

# With several ranks, each rank's number of embedding rows is a multiple of 16, because copies of
# logits are 16 bytes (8 logits) long, and the sampler makes noise for 4 token ids at a time.
_ROWS = 16
# oneDNN lays out weights for this number of input rows. With 16 or 256, products were as fast.
_PACK_ROWS = 64


class _Linear:
    """A linear layer with this rank's weight [rows, columns] and bias [rows]."""

    def __init__(self, rows: int, columns: int, *, bias: bool, place: Place) -> None:
        self._place = place
        self.weight: Tensor | None = place.empty(rows, columns)
        self.bias = place.empty(rows) if bias else None
        self._matmul: Matmul


class ColumnLinear(_Linear):
    """Several projections of the same input, computed as one product with their stacked weights.

    Args:
        sizes: number of output features of each projection, over all ranks.
        shares: for each projection, this rank's first output feature and number of output features.
            By default all ranks have equal shares.
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

    def __call__(self, normed: Normed) -> tuple[Tensor, Stream]:
        """Return outputs [T, N], and the stream with part added."""
        return self._matmul.normed(normed)

    def prepare(self, norm: RMSNorm | None = None, *, gate: str | None = None) -> None:
        """Make the `Matmul` of the loaded weight. `norm` is the norm of the layer's input.

        A layer whose norm is not known here works too. With a `gate` the layer returns `gate_mul`
        of two projections instead.
        """
        assert self.weight is not None
        matmul = make_matmul(self.weight, self.bias, self._place, norm, gate=gate)
        self._matmul, self.weight, self.exact = matmul, None, matmul.exact

    def weight_targets(self, *names: str) -> dict[str, WeightTarget]:
        """Return where to load the checkpoint's layers `names`, one layer for each projection."""
        slots, row = dict[str, WeightTarget](), 0
        for name, full, (start, length) in zip(names, self._full, self._shares, strict=True):
            for kind, shape in (("weight", full), ("bias", full[:1])):
                param = getattr(self, kind)
                if param is not None:
                    target = param[row : row + length]
                    slots[f"{name}.{kind}"] = WeightTarget(target, shape, 0, start, length)
            row += length
        return slots

    def fused_target(self, name: str) -> dict[str, WeightTarget]:
        """Return where to load the layer `name`, which has all projections and no bias."""
        assert self.weight is not None
        shares, above = list[tuple[int, int]](), 0
        for full, (start, length) in zip(self._full, self._shares, strict=True):
            shares.append((above + start, length))
            above += full[0]
        shape = above, self.weight.shape[1]
        target = WeightTarget(self.weight, shape, 0, *shares[0], more=tuple(shares[1:]))
        return {f"{name}.weight": target}


class QKVLinear(ColumnLinear):
    """Query, key and value projections. `num_heads` and `num_kv_heads` count heads of all ranks."""

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
    """A linear layer whose output is added to the residual stream. Ranks divide its inputs."""

    def __init__(self, input_size: int, output_size: int, *, bias: bool, place: Place) -> None:
        self._full = (output_size, input_size)
        self._columns = place.parallel.per_rank("input features", input_size)
        super().__init__(output_size, self._columns, bias=bias, place=place)

    def prepare(self, after: RMSNorm | None) -> None:
        """Make the `Matmul` of the loaded weight; for `after` see `make_matmul`."""
        assert self.weight is not None
        if self._place.parallel.rank > 0:
            # The outputs of all ranks are added up, so only rank 0 adds the bias.
            self.bias = None
        matmul = make_matmul(self.weight, self.bias, self._place, after=after, row=True)
        self._matmul, self.weight, self.exact = matmul, None, matmul.exact

    def __call__(self, x: Tensor, stream: Stream) -> Stream:
        """Return `stream` plus the layer's output for x [T, K]. `stream.part` must be None."""
        return self._matmul.added(x, stream)

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        assert self.weight is not None
        start = self._place.parallel.rank * self._columns
        slots = {f"{name}.weight": WeightTarget(self.weight, self._full, 1, start, self._columns)}
        if self.bias is not None:
            slots[f"{name}.bias"] = WeightTarget(self.bias, self._full[:1])
        return slots


class VocabEmbedding:
    """This rank's embedding table: the rows of `length` tokens, then padding rows (zeros)."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Place, scale: float = 1.0) -> None:
        self._parallel, self._scale = place.parallel, scale
        parallel = place.parallel
        unit = _ROWS if parallel.size > 1 else 1
        rows = -(-vocab_size // (parallel.size * unit)) * unit
        self._shape = (vocab_size, hidden_size)
        self._start = parallel.rank * rows
        self.length = max(0, min(rows, vocab_size - self._start))
        self.weight = place.empty(rows, hidden_size).zero_()

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return `scale` times the embeddings [T, hidden_size] of the tokens, int64 [T]."""
        rows = self._rows(token_ids)
        return rows if self._scale == 1 else rows.mul_(self._scale)

    def _rows(self, token_ids: Tensor) -> Tensor:
        if self._parallel.size == 1:
            return self.weight.index_select(0, token_ids)
        local = token_ids - self._start
        others = (local < 0) | (local >= self.weight.shape[0])
        rows = self.weight.index_select(0, local.masked_fill(others, 0))
        # All ranks but one add +0, so the sum is the embedding (-0 becomes +0). Multiplying the
        # other ranks' rows by 0 would turn an infinite weight of their first row into NaN.
        return self._parallel.all_reduce(rows.masked_fill_(others.unsqueeze(-1), 0.0))

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        start, target = min(self._start, self._shape[0]), self.weight[: self.length]
        return {f"{name}.weight": WeightTarget(target, self._shape, 0, start, self.length)}


class VocabHead:
    """The output head: computes logits times `scale`, with the weight of a `VocabEmbedding`."""

    def __init__(self, table: VocabEmbedding, place: Place, scale: float = 1.0) -> None:
        self._table, self._scale = table, scale
        self._place = place
        self._matmul: Matmul

    def prepare(self, norm: RMSNorm) -> None:
        self._matmul = make_matmul(self._table.weight, None, self._place, norm)
        self.exact = self._matmul.exact

    def __call__(self, normed: Normed, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits [R, N] of R tokens for this rank's N table rows, and the tokens' stream.

        The logits of padding rows are -inf.
        """
        logits, stream = self._matmul.normed(normed, out=out)
        if self._scale != 1:
            logits.mul_(self._scale)
        length = self._table.length
        if length < logits.shape[1]:
            logits[:, length:] = float("-inf")
        return logits, stream.total


class Matmul:
    """Computes x W^T + b by torch for W [N, K] and b [N]; the reference for fused kernels.

    Args:
        gate: if given, W is [g | up], and `normed` returns `gate_mul` [T, N / 2] of the product.
    """

    exact = False  # whether it was measured that a row's bits depend on no other row

    def __init__(
        self, weight: Tensor, bias: Tensor | None, place: Place, *, gate: str | None = None
    ) -> None:
        self.weight = weight
        self._bias = bias
        self._place = place
        self._gate = gate
        self._folded = False  # whether the product includes the preceding norm's weight

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return x W^T + b [T, N] for x [T, K]. If `out` is given, the result is stored there."""
        y = F.linear(x, self.weight, self._bias)
        return y if out is None else out.copy_(y)

    def added(self, x: Tensor, stream: Stream) -> Stream:
        """Return `stream` plus x W^T + b for x [T, K]. `stream.part` must be None."""
        return Stream(stream.total, self(x))

    def normed(self, normed: Normed, out: Tensor | None = None) -> tuple[Tensor, Stream]:
        """Return norm(stream) W^T + b, gated or [T, N], and the stream with its part added.

        If `out` is given, the product is stored in `out`.
        """
        x, stream = normed.norm.compute(normed.stream, scaled=not self._folded)
        y = self(x, out)
        return (gate_mul(y, self._gate, self._place) if self._gate else y), stream


class CPUMatmul(Matmul):
    """Float32 products on a CPU: `HalfLinear` for up to `few_rows` input rows, oneDNN for more.

    If `fuses`, `added` may add the product to the stream's total.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        place: Place,
        norm: RMSNorm | None,
        *,
        fuses: bool = True,
        gate: str | None = None,
    ) -> None:
        super().__init__(weight, bias, place, gate=gate)
        scale = norm.scale if norm is not None and norm.changes else None
        self._folded = scale is not None
        self._half = HalfLinear(weight, scale) if HalfLinear.holds(weight) else None
        self.few_rows = self._half.most_rows if self._half else 0
        if self.few_rows == math.inf:
            self.weight = weight.new_empty(0)
        else:
            folded = weight if scale is None else weight * scale
            self.weight = torch.ops.mkldnn._reorder_linear_weight(folded, _PACK_ROWS)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._adding = self._half if fuses and bias is None and place.parallel.size == 1 else None

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


def gate_mul(x: Tensor, gate: str, place: Place) -> Tensor:
    """Return f(g) * up [T, n] for x = [g | up] [T, 2n] (gated linear units, Shazeer 2020).

    f is SiLU if `gate` is "silu", and the tanh approximation of GELU if `gate` is "gelu_tanh".
    """
    if place.fused:
        from layers.kernels import rowwise

        return rowwise.gate_mul(x, gate, pdl=place.pdl)
    g, up = x.chunk(2, dim=-1)
    y = F.silu(g) if gate == "silu" else F.gelu(g, approximate="tanh")
    return y.mul_(up)


def make_matmul(
    weight: Tensor,
    bias: Tensor | None,
    place: Place,
    norm: RMSNorm | None = None,
    *,
    after: RMSNorm | None = None,
    row: bool = False,
    gate: str | None = None,
) -> Matmul:
    """Make the `Matmul` for `place`. Its input has the norm `norm`; for `gate` see `Matmul`.

    If `row`, the product is added to the stream. Then `after` is the norm of the resulting stream,
    or None if the product itself has a norm first.

    If `norm` is given, a `CPUMatmul` multiplies its own weight by the weight of `norm`. Callers of
    this `CPUMatmul` may only use its method `normed`, and only with this norm.
    """
    if place.device.type == "cpu" and place.dtype == torch.float32 and torch._C._has_mkldnn:
        fuses = not row or after is not None
        return CPUMatmul(weight, bias, place, norm, fuses=fuses, gate=gate)
    if place.fused and has_wgmma(place.device):
        from layers.exact_matmul import ExactMatmul

        if ExactMatmul.holds(weight, bias, gated=gate is not None):
            return ExactMatmul(weight, bias, place, after, row=row, gate=gate)
    return Matmul(weight, bias, place, gate=gate)
