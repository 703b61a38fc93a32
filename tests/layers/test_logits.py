"""Penalties, filters and log-probabilities against transformers' processors on the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from layers.logits import Filters, Penalties, forbid, logit_bounds, penalize, score
from tests.layers.test_sampler import _assert_distributed, sample

VOCAB_SIZE = 500
NUM_DRAWS = 20_000


def _logits(rows: int, seed: int = 1, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def _filters(rows: int, **values: float) -> Filters:
    defaults = {"temperatures": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
    return Filters(*(torch.full((rows,), v) for v in {**defaults, **values}.values()))


def _kept(logits: Tensor, filters: Filters) -> Tensor:
    """[R, V] logits, -inf for tokens that may not be drawn."""
    return logits.masked_fill(logits < logit_bounds(logits, filters).unsqueeze(1), float("-inf"))


def _oracle(logits: Tensor, **values: float) -> Tensor:
    """Probabilities after transformers' warpers, in the order in which `generate` applies them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(values.get("temperatures", 1.0))])
    if "top_k" in values:
        warpers.append(TopKLogitsWarper(int(values["top_k"])))
    if "top_p" in values:
        warpers.append(TopPLogitsWarper(values["top_p"]))
    if "min_p" in values:
        warpers.append(MinPLogitsWarper(values["min_p"]))
    scores: Tensor = warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits.clone())
    return scores.softmax(1)


CASES: list[dict[str, float]] = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB_SIZE},
    {"top_k": 10 * VOCAB_SIZE},
    {"top_p": 1e-9},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperatures": 0.3, "top_p": 0.8},
    {"temperatures": 2.5, "top_k": 40, "top_p": 0.7},
    {"temperatures": 0.7, "top_k": 20, "min_p": 0.1},
    {"temperatures": 1.7, "top_k": 100, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("values", CASES, ids=str)
def test_filtered_distributions_are_those_of_transformers(
    values: dict[str, float], scale: float
) -> None:
    logits = _logits(64, scale=scale)
    kept = _kept(logits, _filters(64, **values)) / values.get("temperatures", 1.0)
    assert (kept.softmax(1) - _oracle(logits, **values)).abs().max() <= 1e-5


@pytest.mark.parametrize("values", CASES, ids=str)
def test_tokens_follow_the_filtered_distribution(values: dict[str, float]) -> None:
    logits = _logits(1, seed=2)
    (probabilities,) = _oracle(logits, **values).double()
    filters = _filters(1, **values)
    count = torch.arange(NUM_DRAWS)
    temperatures = filters.temperatures.expand(NUM_DRAWS)
    least = logit_bounds(logits, filters).expand(NUM_DRAWS)
    rows = logits.expand(NUM_DRAWS, -1)
    tokens = sample(rows, temperatures, count, count, least=least)
    counts = tokens.bincount(minlength=VOCAB_SIZE)
    assert counts[probabilities == 0].sum() == 0
    if (probabilities > 0).sum() > 1:
        _assert_distributed(counts, probabilities)


def test_rows_are_filtered_each_by_its_own_parameters() -> None:
    logits = _logits(len(CASES))
    together = [_filters(1, **values) for values in CASES]
    rows = Filters(*(torch.cat([getattr(f, n) for f in together]) for n in Filters.__slots__))
    alone = [logit_bounds(logits[i : i + 1], f) for i, f in enumerate(together)]
    assert torch.equal(logit_bounds(logits, rows), torch.cat(alone))


def test_nothing_is_taken_from_rows_without_filters_or_temperature() -> None:
    logits = _logits(3)
    assert torch.equal(_kept(logits, _filters(3)), logits)
    assert torch.equal(_kept(logits, _filters(3, temperatures=0.0, top_k=2, min_p=0.5)), logits)


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-6])
def test_a_tiny_temperature_keeps_the_most_likely_token(temperature: float) -> None:
    logits = _logits(3)
    kept = _kept(logits, _filters(3, temperatures=temperature, top_p=0.5, min_p=0.1))
    assert torch.equal(kept.isfinite().sum(1), torch.ones(3, dtype=torch.long))
    assert torch.equal(kept.argmax(1), logits.argmax(1))


def test_equally_likely_tokens_at_the_border_are_all_kept() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, :4] = torch.tensor([2.0, 1.0, 1.0, 1.0])
    for values in ({"top_k": 2}, {"top_p": 0.01 + float(logits.softmax(1)[0, 0])}):
        assert _kept(logits, _filters(1, **values)).isfinite().nonzero()[:, 1].tolist() == [
            0,
            1,
            2,
            3,
        ]


def test_minus_infinity_stays_out() -> None:
    logits = torch.full((1, VOCAB_SIZE), float("-inf"))
    logits[0, [3, 9]] = torch.tensor([1.0, 0.0])
    for values in CASES:
        kept = _kept(logits, _filters(1, **values))
        assert set(kept.isfinite().nonzero()[:, 1].tolist()) <= {3, 9}
        assert kept[0, 3] == 1.0


def _penalties(rows: int, **values: float) -> Penalties:
    defaults = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0}
    return Penalties(*(torch.full((rows,), v) for v in {**defaults, **values}.values()))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 8.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = _logits(4)
    tokens = torch.randint(VOCAB_SIZE, (4, 60), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([1, 7, 60, 33])
    changed = logits.clone()
    penalize(changed, tokens, lengths // 2, lengths, _penalties(4, repetition=penalty))
    oracle = RepetitionPenaltyLogitsProcessor(penalty)
    for i, n in enumerate(lengths.tolist()):
        expected: Any = oracle(tokens[i : i + 1, :n], logits[i : i + 1].clone())
        assert torch.equal(changed[i : i + 1], expected)


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = _logits(2)
    tokens = torch.tensor([[5, 6, 7, 7, 5, 9], [1, 1, 1, 1, 1, 1]])
    prompts, lengths = torch.tensor([2, 4]), torch.tensor([5, 4])
    changed = logits.clone()
    penalize(changed, tokens, prompts, lengths, _penalties(2, presence=0.5, frequency=2))
    expected = logits.clone()
    expected[0, 7] -= 0.5 + 2 * 2
    expected[0, 5] -= 0.5 + 2
    assert torch.allclose(changed, expected)


def test_forbidden_tokens_are_minus_infinity_and_others_keep_their_bits() -> None:
    """Also if several entries name a token, of which only one forbids it."""
    logits = torch.tensor([[1.0, -0.0, 3.0, float("nan")], [float("inf"), 2.0, -1.0, 5.0]])
    changed = logits.clone()
    rows = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    tokens = torch.tensor([2, 2, 1, 3, 0, 1, 3, 3])
    when = torch.tensor([False, True, False, True, True, False, True, True])
    forbid(changed, rows, tokens, when)
    least = float("-inf")
    expected = torch.tensor([[1.0, -0.0, least, float("nan")], [least, 2.0, -1.0, least]])
    assert torch.equal(changed.view(torch.int32), expected.view(torch.int32))


def test_scores_are_log_probabilities_and_the_largest_of_them() -> None:
    logits = _logits(300)
    tokens = torch.arange(300)
    found = score(logits, tokens, 4)
    expected = logits.double().log_softmax(1)
    assert torch.allclose(found.values.double(), expected[tokens, tokens], atol=1e-6)
    best = expected.topk(4, dim=1)
    assert torch.equal(found.top_tokens, best.indices)
    assert torch.allclose(found.top_values.double(), best.values, atol=1e-6)
    rows = torch.arange(299, -1, -1)
    turned = score(logits, tokens, 4, rows)
    assert torch.allclose(turned.values.double(), expected[rows][tokens, tokens], atol=1e-6)
    assert torch.equal(turned.top_tokens, found.top_tokens[rows])
    assert score(logits[:0], tokens[:0], 2).top_values.shape == (0, 2)
    assert score(logits[:5], tokens[:5], 0).top_tokens.shape == (5, 0)
