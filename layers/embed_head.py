"""Token embedding and output head, the vocabulary divided over ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.parallel import ParallelContext, WeightSlot, frozen


class VocabEmbedding(nn.Module):
    """One row per token; each rank holds an equal part of the vocabulary, zero-padded to fit.

    It serves as embedding (`forward`) and as output head (`logits`), so that a tied checkpoint
    uses one instance for both.
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
        super().__init__()
        self._full = (vocab_size, hidden_size)
        self._parallel = parallel
        rows = -(-vocab_size // parallel.size)
        self._start = parallel.rank * rows
        # A rank's rows past the vocabulary stay zero.
        self.weight = frozen(torch.zeros(rows, hidden_size, dtype=dtype, device=device))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids [T] -> embeddings [T, hidden_size]."""
        if self._parallel.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self._start
        mine = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(local * mine, self.weight)
        return self._parallel.all_reduce(rows * mine.unsqueeze(-1))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden_size] -> logits [R, vocab_size]."""
        part = F.linear(hidden, self.weight)
        if self._parallel.size == 1:
            return part
        return self._parallel.all_gather(part)[:, : self._full[0]]

    def weight_slots(self, name: str) -> dict[str, WeightSlot]:
        """Slot of the checkpoint's tensor `name`.weight."""
        length = max(0, min(self.weight.shape[0], self._full[0] - self._start))
        target = self.weight.data[:length]
        return {f"{name}.weight": WeightSlot(target, self._full, 0, self._start, length)}
