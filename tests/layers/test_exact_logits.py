"""What follows the logits gives a row the same bits whatever the other rows are (on a CPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layers.logits import (
    Filters,
    Penalties,
    TokenScores,
    key_tokens,
    key_values,
    logit_bounds,
    penalize,
    score,
    token_keys,
)
from layers.sampler import sample_shard
from tests.layers.tensors import keys

NAN, INF = float("nan"), float("inf")
VOCABS = [7, 1000, 49_155]


def _logits(rows: int, vocab_size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rounded so that a row has many equal logits."""
    generator = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(rows, vocab_size, generator=generator) * 8).round().to(dtype) / 4


def _same(a: TokenScores, b: TokenScores) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in TokenScores.__slots__)


def _row(found: TokenScores, i: int) -> TokenScores:
    return TokenScores(*(getattr(found, n)[i : i + 1] for n in TokenScores.__slots__))


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_a_row_has_the_same_scores_alone_in_any_place_and_dtype(vocab_size: int) -> None:
    count = 150 if vocab_size < 2000 else 9
    logits = _logits(count, vocab_size)
    tokens = torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(1))
    found = score(logits, tokens, 5)
    wide = torch.zeros(count, vocab_size + 3)
    wide[:, 1 : 1 + vocab_size] = logits
    assert _same(score(logits.float(), tokens, 5), found)
    assert _same(score(wide[:, 1 : 1 + vocab_size], tokens, 5), found)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    turned = score(logits, tokens[order], 5, order)
    for i in range(0, count, 4):
        assert _same(_row(turned, i), _row(found, int(order[i])))
        assert _same(score(logits[i : i + 1], tokens[i : i + 1], 5), _row(found, i))
    # What another request wants changes how many there are.
    fewer = score(logits, tokens, 2)
    assert torch.equal(fewer.values, found.values)
    assert torch.equal(fewer.top_tokens, found.top_tokens[:, :2])
    assert torch.equal(fewer.top_values, found.top_values[:, :2])


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("num_top", [0, 1, 5, 64])
def test_a_rank_is_the_number_of_larger_logits_plus_one(vocab_size: int, num_top: int) -> None:
    count = 150 if vocab_size < 2000 else 9
    logits = _logits(count, vocab_size)
    logits[0, ::2] = -INF
    num_top = min(num_top, vocab_size)
    tokens = torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(1))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    found = score(logits, tokens, num_top, order, ranked=True)
    rows = logits[order].float()
    asked = torch.cat((tokens.unsqueeze(1), found.top_tokens), dim=1)
    expected = [
        [int((row > row[token]).sum()) + 1 for token in some]
        for row, some in zip(rows, asked, strict=True)
    ]
    assert found.ranks.tolist() == expected
    plain = score(logits, tokens, num_top, order)
    assert plain.ranks.shape == (count, 0)
    assert all(
        torch.equal(getattr(plain, name), getattr(found, name))
        for name in TokenScores.__slots__
        if name != "ranks"
    )
    none = score(logits[:0], tokens[:0], num_top, ranked=True)
    assert none.ranks.shape == (0, 1 + num_top)


def test_of_equal_logits_the_lowest_id_comes_first() -> None:
    logits = torch.zeros(2, 1000)
    logits[0, [3, 500, 999]] = 1.0
    logits[1, 5:] = -0.0
    found = score(logits, torch.tensor([500, 7]), 5)
    assert found.top_tokens.tolist() == [[3, 500, 999, 0, 1], [0, 1, 2, 3, 4]]
    # A token has one log-probability, whether it is asked for or among the likeliest.
    assert found.values[0] == found.top_values[0, 1]
    assert len(set(found.top_values[1].tolist())) == 1
    every = score(_logits(1, 300), torch.tensor([0]), 300)
    order = _logits(1, 300).float().sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(every.top_tokens, order)


def test_rows_with_broken_logits_change_no_other() -> None:
    logits = _logits(6, 1000, torch.float32)
    tokens = torch.arange(6)
    found = score(logits, tokens, 3)
    logits[0, 9] = NAN
    logits[2, 9] = -NAN
    logits[4] = -INF
    logits[5, 3] = INF
    broken = score(logits, tokens, 3)
    for i in (0, 2, 4):
        assert broken.values[i].isnan()
        assert broken.top_values[i].isnan().all()
        assert ((broken.top_tokens[i] >= 0) & (broken.top_tokens[i] < 1000)).all()
    for i in (1, 3):
        assert _same(_row(broken, i), _row(found, i))


def test_masked_tokens_have_log_probability_minus_infinity() -> None:
    logits = torch.full((1, 1000), -INF)
    logits[0, 5] = 3.0
    found = score(logits, torch.tensor([4]), 2)
    assert found.values.tolist() == [-INF]
    assert found.top_values.tolist() == [[0.0, -INF]]
    assert found.top_tokens.tolist() == [[5, 0]]


def test_a_rare_token_counts_in_the_sum() -> None:
    """151,935 tokens, each 24 * log(2) less likely than the first, are 0.9 % of the whole."""
    logits = torch.full((1, 151_936), -24 * 0.6931471805599453)
    logits[0, 0] = 0.0
    found = score(logits, torch.tensor([0]), 0)
    assert torch.allclose(found.values.double(), logits.double().log_softmax(1)[0, :1], rtol=1e-4)


def test_keys_are_ordered_by_value_and_then_by_lowest_id() -> None:
    values = torch.tensor([NAN, INF, 3e38, 1.0, 1e-45, 0.0, -1e-45, -1.0, -3e38, -INF])
    both = torch.stack((token_keys(values, torch.tensor(2)), token_keys(values, torch.tensor(9))))
    assert (both.T.flatten().diff() < 0).all()
    assert torch.equal(key_values(both[0]).nan_to_num(7.0), values.nan_to_num(7.0))
    assert key_tokens(both[1]).tolist() == [9] * len(values)
    zeros = torch.tensor([0.0, -0.0])
    assert len(set(token_keys(zeros, torch.tensor(1)).tolist())) == 1
    # Whatever its sign, a NaN is larger than inf.
    signed = torch.tensor([NAN, -NAN])
    assert (token_keys(signed, torch.tensor(1)) > both[0, 1]).all()


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_a_row_is_penalised_filtered_and_drawn_as_if_it_were_alone(vocab_size: int) -> None:
    count, generator = 11, torch.Generator().manual_seed(3)
    logits = _logits(count, vocab_size).float()
    tokens = torch.randint(min(vocab_size, 40), (count, 30), generator=generator)
    lengths = torch.randint(2, 30, (count,), generator=generator)
    by = Penalties(*(torch.rand(3, count, generator=generator) + 0.5))
    filters = Filters(
        torch.rand(count, generator=generator) + 0.3,
        torch.randint(0, 60, (count,), generator=generator).float(),
        torch.rand(count, generator=generator),
        torch.rand(count, generator=generator) * 0.1,
    )
    seeds = torch.randint(2**62, (count, 2), generator=generator)

    def drawn(rows: Tensor) -> list[Tensor]:
        changed = logits[rows].clone()
        own = Penalties(*(getattr(by, n)[rows] for n in Penalties.__slots__))
        penalize(changed, tokens[rows], lengths[rows] // 2, lengths[rows], own)
        some = Filters(*(getattr(filters, n)[rows] for n in Filters.__slots__))
        least = logit_bounds(changed, some)
        rest = filters.temperatures[rows], seeds[rows], lengths[rows]
        return [changed, least, *sample_shard(changed, *rest, least=least)]

    together = drawn(torch.arange(count))
    for rows in (*torch.arange(count).unsqueeze(1), torch.randperm(count, generator=generator)):
        for alone, whole in zip(drawn(rows), together, strict=True):
            assert torch.equal(alone, whole[rows])


def test_rows_without_penalties_keep_their_bits_among_rows_with_them() -> None:
    logits = torch.tensor([[-0.0, 1e-45, 3e38, -INF, INF, 0.1]])
    changed = logits.clone()
    none = Penalties(torch.ones(1), torch.zeros(1), torch.zeros(1))
    penalize(changed, torch.arange(6).unsqueeze(0), torch.tensor([2]), torch.tensor([6]), none)
    assert torch.equal(changed.view(torch.int32), logits.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_copy_of_the_logits_gives_the_same(dtype: torch.dtype) -> None:
    """A row is copied if a request of its block has penalties, `min_tokens` or processors."""
    logits = _logits(8, 1000, dtype)
    filters = Filters(*torch.tensor([[0.9], [40.0], [0.8], [0.01]]).expand(4, 8))
    least = logit_bounds(logits, filters)
    assert torch.equal(least, logit_bounds(logits.float(), filters))
    rest = torch.full((8,), 0.9), keys(torch.arange(8)), torch.arange(8)
    for bound in (None, least, torch.full((8,), -INF)):
        a, b = (sample_shard(x, *rest, least=bound) for x in (logits, logits.float()))
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    plain = sample_shard(logits, *rest)
    assert torch.equal(plain[0], sample_shard(logits, *rest, least=torch.full((8,), -INF))[0])
