"""Embedding, linear layers and output head, which know their share of a tensor-parallel group.

Embedding and head divide the vocabulary over ranks, column-parallel layers their outputs and
row-parallel ones their inputs (Shoeybi et al., Megatron-LM, 2019).
"""

from __future__ import annotations

from torch import Tensor

from layers.matmul import Matmul, make_matmul
from layers.norm_rope import Normed, RMSNorm, Stream
from layers.parallel import Place
from utils.loader import WeightTarget

# The kernels for small batches make outputs in multiples of this, the sampler's noise of 4.
_ROWS = 16


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
