"""Token embedding and output head, the vocabulary divided over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from layers.layernorm import RMSNorm
from layers.parallel import ParallelContext
from layers.product import Product, make_product
from utils.loader import WeightSlot

# The kernels for small batches (layers/kernels) make outputs in multiples of this, and the noise
# (layers/sampler.py) comes in groups of 4 tokens.
_ROWS = 16


class VocabTable:
    """One row per token: [this rank's rows, hidden_size], zero past the end of the vocabulary.

    Every rank has as many rows; those past the end are padding.

    Attributes:
        start: token id of the first row.
        length: rows that belong to tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        parallel: ParallelContext,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.vocab_size = vocab_size
        rows = vocab_size
        if parallel.size > 1:
            rows = -(-vocab_size // (parallel.size * _ROWS)) * _ROWS
        self.start = parallel.rank * rows
        self.length = max(0, min(rows, vocab_size - self.start))
        self.weight = torch.zeros(rows, hidden_size, dtype=dtype, device=device)

    def weight_slots(self, name: str) -> dict[str, WeightSlot]:
        """Slot of the checkpoint's tensor `name`.weight."""
        shape = (self.vocab_size, self.weight.shape[1])
        start, length = min(self.start, self.vocab_size), self.length
        return {f"{name}.weight": WeightSlot(self.weight[:length], shape, 0, start, length)}


class VocabEmbedding:
    """Token ids to vectors."""

    def __init__(self, table: VocabTable, parallel: ParallelContext) -> None:
        self._table = table
        self._parallel = parallel

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, hidden_size]."""
        weight = self._table.weight
        if self._parallel.size == 1:
            return weight.index_select(0, token_ids)
        local = token_ids - self._table.start
        mine = (local >= 0) & (local < weight.shape[0])
        rows = weight.index_select(0, local * mine)
        return self._parallel.all_reduce(rows * mine.unsqueeze(-1))


class VocabHead:
    """The final norm and the projection to logits; the table may be the embedding's.

    Args:
        norm: of the hidden states.
    """

    def __init__(self, norm: RMSNorm, table: VocabTable) -> None:
        self.norm = norm
        self._table = table
        self._product: Product

    def finish(self) -> None:
        """The weights are loaded: lay them out for use."""
        self.norm.finish()
        self._product = make_product(self._table.weight, None, self.norm)

    def __call__(self, x: Tensor, residual: Tensor | None, out: Tensor | None = None) -> Tensor:
        """The stream [R, hidden_size] -> logits [R, this rank's rows]; see `Product` for its form.

        Those of padding are -inf. They are put into `out` if it is given.
        """
        logits = self._product.normed(x, residual, self.norm, out=out)[0]
        length = self._table.length
        if length < logits.shape[1]:
            logits[:, length:] = float("-inf")
        return logits
