"""Embedding and head over ranks whose shares of the vocabulary are unequal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.linear import VocabEmbedding, VocabHead
from layers.norm_rope import RMSNorm, Stream
from layers.parallel import ParallelContext
from tests.layers.tensors import load, place, random_tensors, rms_norm

HIDDEN = 16
CASES = [(10, 1), (10, 2), (10, 3), (11, 4), (5, 4), (3, 4)]


def _tables(folder: Path, vocab_size: int, size: int) -> tuple[Tensor, list[VocabEmbedding]]:
    tensors = random_tensors({"embed.weight": (vocab_size, HIDDEN)})
    tables = []
    for rank in range(size):
        table = VocabEmbedding(vocab_size, HIDDEN, place(ParallelContext(rank, size)))
        load(folder, tensors, table.weight_targets("embed"))
        tables.append(table)
    return tensors["embed.weight"], tables


@pytest.mark.parametrize(("vocab_size", "size"), CASES)
def test_the_embeddings_of_all_ranks_sum_to_the_whole(
    tmp_path: Path, vocab_size: int, size: int
) -> None:
    weight, tables = _tables(tmp_path, vocab_size, size)
    tokens = torch.arange(vocab_size).repeat(2)
    parts = [table(tokens) for table in tables]
    assert torch.equal(sum(parts, torch.zeros(1)), F.embedding(tokens, weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_rank_without_a_token_adds_zero(tmp_path: Path, value: float) -> None:
    """Not the product of its first row and 0, which may be NaN, or -0."""
    _, tables = _tables(tmp_path, 40, 2)
    for table in tables:
        table.weight[0] = value
    tokens = torch.tensor([3, 35])
    for rank, table in enumerate(tables):
        other = table(tokens)[1 - rank]
        assert torch.equal(other.view(torch.int32), torch.zeros(HIDDEN, dtype=torch.int32))


@pytest.mark.parametrize(("vocab_size", "size"), CASES)
def test_the_logits_of_all_ranks_join_to_the_whole(
    tmp_path: Path, vocab_size: int, size: int
) -> None:
    """Padding at the end of the last ranks' shares can never be sampled."""
    weight, tables = _tables(tmp_path, vocab_size, size)
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(6, HIDDEN, generator=generator) for _ in range(2))
    norm_weight = torch.rand(HIDDEN, generator=generator) + 0.5
    parts = []
    for table in tables:
        norm = RMSNorm(HIDDEN, 1e-6, place())
        norm.weight.copy_(norm_weight)
        norm.prepare()
        head = VocabHead(table, place())
        head.prepare(norm)
        normed = norm(Stream(residual, x))
        logits, states = head(normed)
        assert torch.equal(states, x + residual)
        parts.append(logits)
        out = torch.full_like(parts[-1], float("nan"))
        assert head(normed, out)[0] is out
        assert torch.equal(out, parts[-1])
    assert len({part.shape for part in parts}) == 1
    logits = torch.cat(parts, 1)
    expected = F.linear(rms_norm(x + residual, norm_weight, 1e-6).float(), weight)
    torch.testing.assert_close(logits[:, :vocab_size], expected, rtol=1e-5, atol=1e-5)
    assert (logits[:, vocab_size:] == float("-inf")).all()
