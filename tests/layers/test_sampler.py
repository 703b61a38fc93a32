from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import layers.sampler
from layers.parallel import ParallelContext
from layers.sampler import NO_TOKEN, Sampler, gumbel_noise, philox4x32, sample_shard
from layers.step_rows import SampledRows
from tests.layers.tensors import keys, place

VOCAB_SIZE = 40
NUM_DRAWS = 20_000


def _words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    """The known-answer vectors of Random123's kat_vectors for philox4x32-10."""
    low, high = _words(key)
    assert philox4x32(_words(counter), (low, high)) == _words(expected)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    **options: Any,
) -> Tensor:
    """One token for each row of logits."""
    seeds = keys(seeds) if seeds.dim() == 1 else seeds
    return sample_shard(logits, temperatures, seeds, positions, **options)[1]


def _sampled(temperatures: Tensor, seeds: Tensor, positions: Tensor) -> SampledRows:
    """Rows of a step that draw by these."""
    places = torch.arange(len(seeds))
    return SampledRows(places, places, positions, temperatures, keys(seeds), places)


def _draws(logits: Tensor, temperature: float, *, by_position: bool = False) -> Tensor:
    """Many tokens from one distribution, a seed or a position for each."""
    count = torch.arange(NUM_DRAWS)
    fixed = torch.full((NUM_DRAWS,), 11)
    return sample(
        logits.expand(NUM_DRAWS, -1),
        torch.full((NUM_DRAWS,), temperature),
        fixed if by_position else count,
        count if by_position else fixed,
    )


def _assert_distributed(counts: Tensor, probabilities: Tensor) -> None:
    """Pearson's test; the limit is five standard deviations above the mean of chi-square."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 10
    observed = torch.cat((counts[~rare], counts[rare].sum().view(1))).double()
    expected = torch.cat((expected[~rare], expected[rare].sum().view(1)))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("by_position", [False, True], ids=["seeds", "positions"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_follow_the_softmax(temperature: float, by_position: bool) -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 2
    tokens = _draws(logits, temperature, by_position=by_position)
    counts = tokens.bincount(minlength=VOCAB_SIZE)
    _assert_distributed(counts, torch.softmax(logits.double() / temperature, 0))


def test_the_test_itself_sees_a_wrong_temperature() -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 2
    counts = _draws(logits, 1.0).bincount(minlength=VOCAB_SIZE)
    with pytest.raises(AssertionError):
        _assert_distributed(counts, torch.softmax(logits.double() / 1.05, 0))


@pytest.mark.parametrize("by_position", [False, True], ids=["seeds", "positions"])
def test_successive_tokens_are_independent(by_position: bool) -> None:
    logits = torch.zeros(6)
    tokens = _draws(logits, 1.0, by_position=by_position)
    pairs = tokens[::2] * 6 + tokens[1::2]
    _assert_distributed(pairs.bincount(minlength=36), torch.full((36,), 1 / 36))


def test_temperature_zero_is_the_argmax_in_a_mixed_batch() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(64, VOCAB_SIZE, generator=generator)
    # Leads far below float32's resolution of logits plus noise.
    logits[::2, 5] = logits[::2].max(1).values * (1 + 1e-6) + 1e-6
    temperatures = torch.tensor([0.0, 1.0]).repeat(32)
    tokens = sample(logits, temperatures, torch.arange(64), torch.arange(64))
    assert torch.equal(tokens[::2], logits[::2].argmax(1))
    assert not torch.equal(tokens[1::2], logits[1::2].argmax(1))


def test_the_lowest_of_equally_good_tokens_is_taken() -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[:, [7, 30]] = 1.0
    zeros = torch.zeros(3)
    assert sample(logits, zeros, zeros.long(), zeros.long()).tolist() == [7, 7, 7]


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(9, VOCAB_SIZE, generator=generator)
    temperatures = torch.rand(9, generator=generator)
    seeds = torch.randint(2**62, (9,), generator=generator)
    positions = torch.randint(4096, (9,), generator=generator)
    together = sample(logits, temperatures, seeds, positions)
    for order in (torch.tensor([4]), torch.randperm(9, generator=generator), torch.arange(3, 8)):
        parts = sample(logits[order], temperatures[order], seeds[order], positions[order])
        assert torch.equal(parts, together[order])


def test_all_bits_of_seed_and_position_count() -> None:
    seeds = torch.tensor([0, 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1])
    noise = gumbel_noise(keys(seeds), torch.full((7,), 5), 8)
    assert len({tuple(row) for row in noise.tolist()}) == 7
    positions = torch.tensor([0, 1, 255, 256, 65536])
    noise = gumbel_noise(keys(torch.full((5,), 9)), positions, 8)
    assert len({tuple(row) for row in noise.tolist()}) == 5


def test_samples_and_kinds_of_seed_have_noise_of_their_own() -> None:
    """The words of the counter are token // 4, position, sample, kind."""
    seed, position = 2**62 + 3, torch.tensor([5])
    seen = set()
    for sample, kind in ((0, 0), (1, 0), (2**31, 0), (0, 1), (1, 1)):
        (noise,) = gumbel_noise(keys([seed], sample, kind), position, 8)
        counter = (torch.arange(2), *(torch.tensor([w]) for w in (5, sample, kind)))
        words = philox4x32(counter, (torch.tensor([3]), torch.tensor([2**30])))
        uniform = ((torch.stack(words, 1).flatten() >> 9).float() + 0.5) * 2.0**-23
        assert torch.equal(noise, -torch.log(-torch.log(uniform)))
        seen.add(tuple(noise.tolist()))
    assert len(seen) == 5


def test_every_token_has_noise_of_its_own() -> None:
    (noise,) = gumbel_noise(keys([3]), torch.tensor([4]), 1000)
    assert len(set(noise.tolist())) == 1000


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 39])
def test_the_noise_of_a_token_does_not_depend_on_the_vocabulary(vocab_size: int) -> None:
    seeds, positions = torch.tensor([3, 8]), torch.tensor([4, 9])
    whole = gumbel_noise(keys(seeds), positions, 64)
    assert torch.equal(gumbel_noise(keys(seeds), positions, vocab_size), whole[:, :vocab_size])


def test_shards_of_the_vocabulary_draw_the_noise_of_the_whole() -> None:
    seeds, positions = torch.tensor([3, 8]), torch.tensor([4, 9])
    whole = gumbel_noise(keys(seeds), positions, 64)
    assert torch.equal(gumbel_noise(keys(seeds), positions, 20, vocab_offset=36), whole[:, 36:56])
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(6))
    logits[:, 40:] += 100
    ones = torch.ones(2)
    expected = sample(logits, ones, seeds, positions)
    assert torch.equal(sample(logits[:, 36:], ones, seeds, positions, vocab_offset=36), expected)


def test_the_noise_has_the_mean_and_spread_of_gumbel() -> None:
    noise = gumbel_noise(keys(torch.arange(50)), torch.arange(50), 4000).double()
    assert abs(float(noise.mean()) - 0.577216) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_no_random_word_gives_infinite_noise(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    def constant(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(torch.full((1, 2), word) for _ in range(4))

    monkeypatch.setattr(layers.sampler, "philox4x32", constant)
    noise = gumbel_noise(keys([0]), torch.tensor([0]), 8)
    assert noise.isfinite().all()


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((NUM_DRAWS, 8), float("-inf"))
    logits[:, 3] = 0.0
    logits[:, 6] = 0.0
    count = torch.arange(NUM_DRAWS)
    assert set(sample(logits, torch.ones(NUM_DRAWS), count, count).tolist()) == {3, 6}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_drawn_from_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(100, VOCAB_SIZE, generator=torch.Generator().manual_seed(7)).to(dtype)
    ones, count = torch.ones(100), torch.arange(100)
    assert torch.equal(
        sample(logits, ones, count, count), sample(logits.float(), ones, count, count)
    )


@dataclass(frozen=True)
class _Shards(ParallelContext):
    """A rank that takes the maximum over what the ranks before it gave."""

    given: list[Tensor] = field(default_factory=list)

    def all_max(self, x: Tensor) -> Tensor:
        self.given.append(x)
        return torch.stack(self.given).amax(0)


def _over_ranks(logits: Tensor, size: int, choose: Callable[[Sampler, Tensor], Tensor]) -> Tensor:
    """What the last rank chooses after the others gave their candidates."""
    given: list[Tensor] = []
    for rank, part in enumerate(logits.chunk(size, 1)):
        sampler = Sampler(place(_Shards(rank, size, given)))
        tokens = choose(sampler, part)
    return tokens


NAN, INF = float("nan"), float("inf")


def _broken(value: float, *, all_inf: bool) -> Tensor:
    """Logits of which every second row has a single `value`, or others that are all -inf."""
    logits = torch.randn(32, 64, generator=torch.Generator().manual_seed(9))
    if all_inf:
        logits[::2] = -INF
    logits[torch.arange(0, 32, 2), torch.arange(16) * 4] = value
    return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_without_a_choice_get_no_token(size: int, temperature: float) -> None:
    rows = _sampled(torch.full((32,), temperature), torch.arange(32), torch.arange(32))
    for value, all_inf in ((NAN, False), (-NAN, False), (NAN, True), (-INF, True)):
        logits = _broken(value, all_inf=all_inf)
        for choose in (
            lambda sampler, part: sampler(part, rows),
            lambda sampler, part: sampler(part, rows, least=torch.full((32,), -5.0)),
            *([] if temperature else [lambda sampler, part: sampler.greedy(part)]),
        ):
            tokens = _over_ranks(logits, size, choose)
            assert (tokens[::2] == NO_TOKEN).all()
            assert (tokens[1::2] >= 0).all()
    for value, all_inf in ((INF, False), (0.0, True), (-3e38, True)):
        tokens = _over_ranks(_broken(value, all_inf=all_inf), size, lambda s, part: s(part, rows))
        assert (tokens[::2] == torch.arange(16) * 4).all()


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_ranks_choose_what_one_would(size: int, scale: float) -> None:
    """Logits of all signs and sizes; every other row has none above zero."""
    logits = torch.randn(200, 64, generator=torch.Generator().manual_seed(8)) * scale
    logits[::2] = -logits[::2].abs()
    temperatures = torch.linspace(0, 2 * scale, 200)
    rest = (temperatures, torch.arange(200), torch.arange(200))
    rows = _sampled(*rest)
    chosen = _over_ranks(logits, size, lambda sampler, part: sampler(part, rows))
    assert torch.equal(chosen, sample(logits, *rest))
    least = logits.sort(1).values[:, -3]
    kept = _over_ranks(logits, size, lambda sampler, part: sampler(part, rows, least=least))
    assert torch.equal(kept, sample(logits, *rest, least=least))
    assert (logits.gather(1, kept.unsqueeze(1)).squeeze(1) >= least).all()
    greedy = _over_ranks(logits, size, lambda sampler, part: sampler.greedy(part))
    assert torch.equal(greedy, logits.argmax(1))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_choose_for_a_row_alone_what_they_choose_in_a_batch(size: int) -> None:
    """Of logits in 16 bits, and of a float32 copy; a bound that masks nothing changes nothing."""
    logits = torch.randn(30, 64, generator=torch.Generator().manual_seed(10)).bfloat16()
    rest = torch.linspace(0, 2, 30), torch.arange(30), torch.arange(30) + 5
    low = torch.full((30,), -INF)

    def chosen(x: Tensor, rows: Tensor, least: Tensor | None) -> Tensor:
        about = _sampled(*(value[rows] for value in rest))
        return _over_ranks(x[rows], size, lambda s, part: s(part, about, least=least))

    together = chosen(logits, torch.arange(30), None)
    for rows in (*torch.arange(30).unsqueeze(1), torch.arange(29, -1, -1)):
        for x in (logits, logits.float()):
            assert torch.equal(chosen(x, rows, low[rows]), together[rows])


class _Gathered(ParallelContext):
    """Two ranks, of which the other one has logits of zero."""

    def all_gather(self, x: Tensor) -> Tensor:
        whole = x.new_zeros(self.size, *x.shape)
        whole[self.rank] = x
        return whole


def test_whole_rows_have_no_columns_of_padding() -> None:
    """A logits processor gets them, and must not be able to choose a token that does not exist."""
    logits = torch.randn(3, 16)
    for rank in range(2):
        whole = Sampler(place(_Gathered(rank, 2)), vocab_size=29).gathered(logits)
        expected = torch.zeros(3, 32)
        expected[:, 16 * rank : 16 * rank + 16] = logits
        assert torch.equal(whole, expected[:, :29])


def test_ranks_settle_ties_for_the_lowest_token() -> None:
    logits = torch.full((6, 64), -1.0)
    logits[0, [17, 40]] = 5.0
    # Zeros of both signs are equal.
    logits[1, 20], logits[1, 50] = -0.0, 0.0
    logits[2, 20], logits[2, 50] = 0.0, -0.0
    logits[3] = float("-inf")
    logits[3, 63] = -3e38
    logits[4, 16:] = float("-inf")
    logits[5, [5, 30]] = float("inf")
    zeros = torch.zeros(6)
    for choose in (
        lambda sampler, part: sampler.greedy(part),
        lambda sampler, part: sampler(part, _sampled(zeros, zeros.long(), zeros.long())),
    ):
        assert _over_ranks(logits, 4, choose).tolist() == [17, 20, 20, 63, 0, 5]
