"""The kernels behind the logits give the same bits for any block, dtype, stride and company.

They run in Triton's interpreter, in a process that one test starts. tests/gpu has the same on CUDA.
"""

import pytest
import torch
from torch import Tensor

import layers.logits
from layers.logits import Filters, score
from tests.kernels.interpreter import (
    HAS_TRITON,
    INTERPRET,
    interpreted,
    patch_interpreter,
    poisoned_memory,
    run_in_interpreter,
    starts_interpreter,
)
from tests.layers.tensors import keys

if INTERPRET and HAS_TRITON:
    from layers.kernels import scores
    from layers.kernels.logit_bounds import logit_bounds
    from layers.kernels.sampling import sample_shard
    from tests.kernels.filters import beside_top_p, hard_rows, random_filters

    patch_interpreter()

NAN, INF = float("nan"), float("inf")


@starts_interpreter
def test_in_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.mark.slow
@starts_interpreter
def test_in_interpreter_what_is_slow() -> None:
    run_in_interpreter(__file__, "slow")


def _placed(logits: Tensor, before: int, after: int) -> Tensor:
    """The same values, with rows that begin `before` elements behind an aligned address."""
    rows, size = logits.shape
    wide = torch.full((rows, before + size + after), NAN, dtype=logits.dtype)
    wide[:, before : before + size] = logits
    return wide[:, before : before + size]


def _of(filters: Filters, rows: Tensor) -> Filters:
    return Filters(*(getattr(filters, name)[rows] for name in Filters.__slots__))


def _kept(logits: Tensor, least: Tensor) -> Tensor:
    return ~(logits.float() < least.unsqueeze(1))


@interpreted
@pytest.mark.parametrize(
    "seed", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_bound_depends_on_its_row_alone(seed: int) -> None:
    """Blocks choose other estimates, and other logits to copy; a float32 copy has more bits."""
    logits = hard_rows(2501, torch.bfloat16)
    logits[0, 7] = INF
    logits[4] = -INF
    filters = random_filters(logits, seed)
    if seed == 2:
        logits, filters = beside_top_p(12, 2501)
    least = logit_bounds(logits, filters, block=256)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    for block in (512, 2048):
        again = logit_bounds(_placed(logits, 1, 2), filters, block=block)
        assert torch.allclose(again, least, 0, 0, equal_nan=True)
    turned = logit_bounds(logits[order], _of(filters, order), block=256)
    assert torch.allclose(turned, least[order], 0, 0, equal_nan=True)
    one = logit_bounds(logits[3:4], _of(filters, torch.tensor([3])), block=256)
    assert torch.equal(one, least[3:4])
    copied = logit_bounds(logits.float(), filters, block=256)
    assert torch.equal(_kept(logits, copied), _kept(logits, least))
    assert (logits.float() >= least.unsqueeze(1))[[1, 2, 3]].any(1).all()


def _hard_scores(vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(7, vocab_size, generator=generator) * 8).round().bfloat16() / 4
    logits[1] = 1.5
    logits[2, 1:] = -INF
    logits[3, ::2] = -0.0
    logits[3, 1::2] = 0.0
    logits[4] *= 30
    return logits


@interpreted
@pytest.mark.parametrize("vocab_size", [3, 1000, 1024, 3001])
def test_scores_depend_on_their_row_alone(monkeypatch: pytest.MonkeyPatch, vocab_size: int) -> None:
    logits, rows = _hard_scores(vocab_size), torch.tensor([5, 0, 3, 3, 1, 6, 2, 4])
    count = min(20, vocab_size)
    expected, mass = layers.logits.top_and_mass(logits, rows, count)
    with poisoned_memory():
        got, sums = scores.top_and_mass(logits, rows, count)
    assert torch.equal(got, expected)
    # Both are sums of rounded exponentials, by other functions.
    assert torch.allclose(sums.double(), mass.double(), rtol=1e-6)
    for again in (logits.float(), _placed(logits, 1, 2), _placed(logits.float(), 3, 2)):
        found, added = scores.top_and_mass(again, rows, count)
        assert torch.equal(found, got)
        assert torch.equal(added, sums)
    for i, row in enumerate(rows.tolist()):
        alone = scores.top_and_mass(logits[row : row + 1], torch.tensor([0]), 1)
        assert torch.equal(alone[0], got[i : i + 1, :1])
        assert torch.equal(alone[1], sums[i : i + 1])
    for block in (64, 256):  # other numbers of programs for a row
        monkeypatch.setattr(scores, "_BLOCK", block)
        found, added = scores.top_and_mass(logits, rows, count)
        assert torch.equal(found, got)
        assert torch.equal(added, sums)


@interpreted
def test_as_many_as_there_are_tokens() -> None:
    logits, rows = _hard_scores(1500), torch.arange(7)
    got, _ = scores.top_and_mass(logits, rows, 1500)
    assert torch.equal(got, layers.logits.top_and_mass(logits, rows, 1500)[0])
    empty, sums = scores.top_and_mass(logits, rows[:0], 4)
    assert (empty.shape, sums.shape) == ((0, 4), (0,))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")
def test_scores_of_broken_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 1100)
    logits[0, 9], logits[1, 1099] = NAN, -NAN
    logits[2] = -INF
    expected, _ = layers.logits.top_and_mass(logits, torch.arange(5), 3)
    got, _ = scores.top_and_mass(logits, torch.arange(5), 3)
    assert torch.equal(got, expected)
    monkeypatch.setattr(layers.logits, "top_and_mass", scores.top_and_mass)
    values = score(logits, torch.zeros(5, dtype=torch.int64), 3).values
    assert values[:3].isnan().all()
    assert torch.allclose(values[3:], logits.log_softmax(1)[3:, 0], atol=1e-6)


@interpreted
@pytest.mark.parametrize("vocab_size", [37, 1500])
def test_a_drawn_token_and_its_score_depend_on_their_row_alone(vocab_size: int) -> None:
    count = 9
    logits = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    about = torch.linspace(0, 2, count), keys(torch.arange(count)), torch.arange(count)
    best, tokens = sample_shard(logits, *about)
    low = torch.full((count,), -INF)
    for least in (None, low, logits.float().amin(1)):
        for again in (logits, logits.float(), _placed(logits, 1, 2)):
            drawn = sample_shard(again, *about, least=least)
            assert torch.equal(drawn[1], tokens)
            assert torch.equal(drawn[0], best)
    for i in range(count):
        one = sample_shard(logits[i : i + 1], *(x[i : i + 1] for x in about), least=low[:1])
        assert torch.equal(one[0], best[i : i + 1])
        assert torch.equal(one[1], tokens[i : i + 1])
