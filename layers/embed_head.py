"""Token embedding and output head, the vocabulary divided over ranks."""

from __future__ import annotations

from torch import Tensor

from layers.layernorm import Normed, RMSNorm
from layers.matmul import Matmul, make_matmul
from layers.parallel import Place
from utils.loader import WeightSlot

# The kernels for small batches (layers/kernels) make outputs in multiples of this, and the noise
# (layers/sampler.py) comes in groups of 4 tokens.
_ROWS = 16


class VocabEmbedding:
    """Token ids to vectors, by a table with one row a token.

    Every rank has as many rows. Those past the end of the vocabulary are padding, and zero.

    Attributes:
        weight: [this rank's rows, hidden_size].
        length: rows that belong to tokens.
    """

    def __init__(self, vocab_size: int, hidden_size: int, place: Place) -> None:
        self._parallel = parallel = place.parallel
        rows = vocab_size
        if parallel.size > 1:
            rows = -(-vocab_size // (parallel.size * _ROWS)) * _ROWS
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

    def weight_slots(self, name: str) -> dict[str, WeightSlot]:
        """Slot of the checkpoint's tensor `name`.weight."""
        start, target = min(self._start, self._shape[0]), self.weight[: self.length]
        return {f"{name}.weight": WeightSlot(target, self._shape, 0, start, self.length)}


class VocabHead:
    """The projection of normalised hidden states to logits, by an embedding's table."""

    def __init__(self, table: VocabEmbedding, place: Place) -> None:
        self._table = table
        self._place = place
        self._matmul: Matmul

    def prepare(self, norm: RMSNorm) -> None:
        """Lay the loaded weights out for use; for `norm` see `make_matmul`."""
        self._matmul = make_matmul(self._table.weight, None, self._place, norm)

    def __call__(self, normed: Normed, out: Tensor | None = None) -> Tensor:
        """Logits [R, this rank's rows], in `out` if it is given; those of padding are -inf."""
        logits = self._matmul.normed(normed, out=out)[0]
        length = self._table.length
        if length < logits.shape[1]:
            logits[:, length:] = float("-inf")
        return logits
