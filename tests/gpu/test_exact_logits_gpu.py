"""What follows the logits gives a row the same bits in any company, on a CUDA device.

Every comparison is `==`. Rows are taken from a pool of 500: some alone, then at every number of
rows, shuffled, in other dtypes, and at other strides and alignments.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import layers.logits
from layers.kernels import scores
from layers.kernels.logit_bounds import FEW_ROWS_BLOCK, MANY_ROWS_BLOCK, logit_bounds
from layers.kernels.sampling import sample_shard
from layers.logits import Filters, Penalties, TokenScores, penalize, score
from layers.parallel import ParallelContext, Place
from layers.sampler import Sampler
from layers.step_rows import SampledRows
from tests.engine.test_exact_rows import check_in_company
from tests.kernels.filters import beside_top_p, hard_rows, random_filters

pytestmark = pytest.mark.gpu

POOL = 500
# Above 132 rows the kernel of bounds takes another block.
COUNTS = (1, 3, 16, 132, 133, 256, 500)
VOCABS = (1000, 49_155, 151_936)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _picks(seed: int = 0) -> Iterator[Tensor]:
    """Indices of rows of the pool: a few rows alone, then shuffled ones of every number."""
    generator = torch.Generator().manual_seed(seed)
    for row in (0, 1, 131, 132, 250, 499):
        yield torch.tensor([row], device="cuda")
    for count in COUNTS:
        yield torch.randperm(POOL, generator=generator)[:count].cuda()


def _placed(logits: Tensor) -> Iterator[Tensor]:
    """The same values: as they are, not aligned, aligned at odd strides, each row twice as far."""
    rows, size = logits.shape
    for before, width in ((0, size), (1, size + 1), (8, size + 11), (0, 2 * size)):
        wide = torch.full((rows, width), float("nan"), dtype=logits.dtype, device="cuda")
        view = wide[:, before : before + size]
        view.copy_(logits)
        yield view


def _filters_of(filters: Filters, rows: Tensor) -> Filters:
    return Filters(*(getattr(filters, name)[rows] for name in Filters.__slots__))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _pool(vocab_size: int) -> tuple[Tensor, Filters]:
    """Half of the rows have sums beside top_p; the others are hard, with filters of every kind."""
    logits, filters = beside_top_p(POOL, vocab_size, "cuda")
    # Of values that float16 holds too, with all bits.
    hard = hard_rows(vocab_size, torch.float32).clamp(-3e4, 3e4).bfloat16().cuda()
    hard[hard.abs() < 2.0**-6] = 0
    logits[1::2] = hard.repeat(POOL // 24 + 1, 1)[: POOL // 2]
    some = random_filters(logits[1::2], vocab_size)
    for name in Filters.__slots__:
        getattr(filters, name)[1::2] = getattr(some, name)
    return logits, filters


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_bounds(vocab_size: int) -> None:
    pool, filters = _pool(vocab_size)
    kept: Tensor | None = None
    for dtype in DTYPES:
        logits = pool.to(dtype)
        assert torch.equal(logits.float(), pool.float())
        least = logit_bounds(logits, filters)
        passes = pool.float() >= least.unsqueeze(1)
        kept = passes if kept is None else kept
        assert torch.equal(passes, kept)
        for block in (FEW_ROWS_BLOCK, MANY_ROWS_BLOCK, 1024):
            assert _same_bits(logit_bounds(logits, filters, block=block), least)
        for rows in _picks():
            own = _filters_of(filters, rows)
            for view in _placed(logits[rows]):
                assert _same_bits(logit_bounds(view, own), least[rows])


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_tokens_and_their_scores(vocab_size: int) -> None:
    pool, filters = _pool(vocab_size)
    generator = torch.Generator().manual_seed(1)
    temperatures = torch.rand(POOL, generator=generator).cuda() * 2
    temperatures[::5] = 0
    seeds = torch.randint(-(2**62), 2**62, (POOL, 2), generator=generator).cuda()
    positions = torch.randint(2**20, (POOL,), generator=generator).cuda()
    bounds = logit_bounds(pool, filters)
    nothing = torch.full_like(bounds, float("-inf"))
    for least in (None, bounds):
        best, tokens = sample_shard(pool, temperatures, seeds, positions, least=least)
        for dtype in DTYPES:
            for rows in _picks(1):
                own = temperatures[rows], seeds[rows], positions[rows]
                low = nothing[rows] if least is None else least[rows]
                for view in _placed(pool[rows].to(dtype)):
                    for bound in (low, None) if least is None else (low,):
                        got = sample_shard(view, *own, least=bound)
                        assert torch.equal(got[1], tokens[rows])
                        assert torch.equal(got[0], best[rows])
        for cut in (vocab_size // 8 * 4, 4):
            parts = [
                sample_shard(part, temperatures, seeds, positions, least=least, vocab_offset=first)
                for part, first in ((pool[:, :cut], 0), (pool[:, cut:], cut))
            ]
            left, right = parts
            assert torch.equal(torch.where(right[0] > left[0], right[1], left[1]), tokens)


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_greedy_tokens(vocab_size: int) -> None:
    """A step of greedy requests takes `argmax`, a captured one the kernel; both the lowest id."""
    pool, _ = _pool(vocab_size)
    pool[7, 5], pool[9] = float("nan"), float("-inf")
    zeros = torch.zeros(POOL, device="cuda")
    at = torch.arange(POOL, device="cuda")
    sampler = Sampler(Place(ParallelContext(), torch.bfloat16, torch.device("cuda")))
    ids = torch.arange(vocab_size, device="cuda")
    highest = pool == pool.amax(1, keepdim=True)
    expected = torch.where(highest, ids, vocab_size).amin(1)
    expected[7] = expected[9] = -1
    for rows in _picks(2):
        for view in _placed(pool[rows]):
            assert torch.equal(sampler.greedy(view), expected[rows])
            about = zeros[rows], torch.stack((at, at), 1)[rows], at[rows]
            assert torch.equal(sample_shard(view, *about)[1], expected[rows])


def _scored(found: TokenScores, rows: Tensor) -> TokenScores:
    return TokenScores(*(getattr(found, name)[rows] for name in TokenScores.__slots__))


def _same_scores(a: TokenScores, b: TokenScores) -> bool:
    values = _same_bits(a.values, b.values) and _same_bits(a.top_values, b.top_values)
    return values and torch.equal(a.top_tokens, b.top_tokens) and torch.equal(a.ranks, b.ranks)


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_log_probabilities(vocab_size: int) -> None:
    pool, _ = _pool(vocab_size)
    tokens = torch.randint(vocab_size, (POOL,), generator=torch.Generator().manual_seed(2)).cuda()
    found = score(pool, tokens, 20, ranked=True)
    for dtype in DTYPES:
        logits = pool.to(dtype)
        for rows in _picks(3):
            own = tokens[rows]
            assert _same_scores(score(logits, own, 20, rows, ranked=True), _scored(found, rows))
            for view in _placed(logits[rows]):
                assert _same_scores(score(view, own, 20, ranked=True), _scored(found, rows))
    for count in (0, 1, 5):
        fewer = score(pool, tokens, count)
        assert _same_bits(fewer.values, found.values)
        assert torch.equal(fewer.top_tokens, found.top_tokens[:, :count])
        assert _same_bits(fewer.top_values, found.top_values[:, :count].contiguous())
    # Likeliest first, of equal ones the lowest id, and right.
    for row in range(0, POOL, 25):
        ordered = pool[row].float().sort(descending=True, stable=True)
        assert torch.equal(found.top_tokens[row], ordered.indices[:20])
        asked = [int(tokens[row]), *found.top_tokens[row].tolist()]
        larger = [int((pool[row] > pool[row, token]).sum()) for token in asked]
        assert found.ranks[row].tolist() == [count + 1 for count in larger]
        expected = pool[row].double().log_softmax(0)
        torch.testing.assert_close(
            found.top_values[row].double(), expected[ordered.indices[:20]], rtol=2e-6, atol=2e-6
        )


@pytest.mark.parametrize("count", [1, 20, 1000])
def test_the_likeliest_tokens_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    pool, _ = _pool(49_155)
    pool[3, 7], pool[4] = float("nan"), float("-inf")
    rows = torch.arange(0, 128, device="cuda")
    got, mass = scores.top_and_mass(pool, rows, count)
    monkeypatch.setattr(layers.logits, "has_triton", lambda: False)
    expected, about = layers.logits.top_and_mass(pool, rows, count)
    assert torch.equal(got, expected)
    usual = torch.arange(5, 128, device="cuda")
    torch.testing.assert_close(mass[usual].double(), about[usual].double(), rtol=3e-6, atol=0)


@pytest.mark.parametrize("vocab_size", [1000, 49_155])
def test_penalties(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(64, vocab_size, generator=generator).cuda()
    # Few different tokens: many atomic additions to one count.
    tokens = torch.randint(20, (64, 3000), generator=generator).cuda()
    lengths = torch.randint(2, 3000, (64,), generator=generator).cuda()
    by = Penalties(*(torch.rand(3, 64, generator=generator) + 0.5).cuda())

    def changed(rows: Tensor) -> Tensor:
        own = Penalties(*(getattr(by, name)[rows] for name in Penalties.__slots__))
        out = logits[rows].clone()
        penalize(out, tokens[rows], lengths[rows] // 2, lengths[rows], own)
        return out

    together = changed(torch.arange(64, device="cuda"))
    for count in (1, 3, 17, 64):
        rows = torch.randperm(64, generator=generator)[:count].cuda()
        assert _same_bits(changed(rows), together[rows])


@pytest.mark.parametrize("vocab_size", [1003, 49_155])
@pytest.mark.parametrize("dtype", DTYPES)
def test_requests_of_every_kind_in_one_step(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(280, vocab_size, generator=generator) * 3).to(dtype).cuda()
    check_in_company(logits, (3, 16, 132, 133, 256, 280))


def test_a_captured_step_draws_what_an_eager_one_does() -> None:
    pool, filters = _pool(49_155)
    at = torch.arange(POOL, device="cuda")
    sampled = SampledRows(at, at, at, filters.temperatures, torch.stack((at, at), 1), at.clone())
    sampler = Sampler(Place(ParallelContext(), torch.bfloat16, torch.device("cuda")))
    least = logit_bounds(pool, filters)
    eager = sampler(pool, sampled), sampler(pool, sampled, least=least)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bounds = logit_bounds(pool, filters)
        captured = sampler(pool, sampled), sampler(pool, sampled, least=bounds)
    graph.replay()
    assert _same_bits(bounds, least)
    for got, want in zip(captured, eager, strict=True):
        assert torch.equal(got, want)
    for size in (1, 133):
        assert torch.equal(sampler(pool[:size], sampled[:size]), eager[0][:size])
