from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layers.linear import ColumnLinear
from layers.norm_rope import RMSNorm, RMSNormalizer, Stream
from layers.output_norms import NoNorm
from layers.parallel import ParallelContext
from tests.layers.tensors import CPU, place, rms_norm

EPS = 1e-6


def _norm(size: int, dtype: torch.dtype = torch.float32, eps: float = EPS) -> RMSNorm:
    norm = RMSNorm(size, eps, place(dtype=dtype))
    norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    norm.prepare()
    return norm


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4, 1e15])
@pytest.mark.parametrize("size", [1, 64, 96])
def test_equals_the_formula_in_float64(size: int, scale: float) -> None:
    norm = _norm(size)
    x = _random(9, size) * scale
    out, stream = norm.compute(Stream(x))
    expected = rms_norm(x, norm.weight, EPS)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert stream.part is None
    assert torch.equal(stream.total, x)


def test_adds_the_part_to_the_total_first() -> None:
    norm = _norm(32)
    total, part = _random(5, 32), _random(5, 32, seed=2)
    out, stream = norm.compute(Stream(total, part))
    assert stream.part is None
    assert torch.equal(stream.total, total + part)
    expected = rms_norm(total + part, norm.weight, EPS)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_a_row_of_zeros_stays_zero(eps: float) -> None:
    out, _ = _norm(32, eps=eps).compute(Stream(torch.zeros(2, 32)))
    assert torch.equal(out, torch.zeros(2, 32))


def test_eps_counts_where_the_input_is_small() -> None:
    norm = _norm(32, eps=1e-2)
    x = torch.full((1, 32), 1e-2)
    expected = rms_norm(x, norm.weight, 1e-2)
    torch.testing.assert_close(norm.compute(Stream(x))[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    norm = _norm(64, torch.bfloat16)
    x = _random(9, 64).bfloat16()
    out, _ = norm.compute(Stream(x))
    assert out.dtype == torch.bfloat16
    expected = rms_norm(x, norm.weight, EPS).bfloat16()
    torch.testing.assert_close(out, expected, rtol=2**-8, atol=0)


def test_a_call_computes_nothing_yet() -> None:
    norm, stream = _norm(8), Stream(_random(2, 8))
    normed = norm(stream)
    assert normed.norm is norm
    assert normed.stream is stream


def test_rows_are_independent() -> None:
    norm = _norm(32)
    x = _random(9, 32)
    rows = torch.cat([norm.compute(Stream(row.unsqueeze(0)))[0] for row in x])
    torch.testing.assert_close(norm.compute(Stream(x))[0], rows)


def test_the_scale_can_be_left_out() -> None:
    norm = _norm(32)
    x = _random(9, 32)
    for _ in range(2):
        expected, _ = norm.compute(Stream(x))
        unscaled, _ = norm.compute(Stream(x), scaled=False)
        torch.testing.assert_close(unscaled * norm.scale, expected)


def test_the_normalizer_leaves_the_factor_to_the_caller() -> None:
    x = _random(3, 2, 16)
    out = RMSNormalizer(16, EPS, CPU)(x) * 16**0.5
    expected = rms_norm(x, torch.ones(16), EPS)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True, slots=True)
class _Pair(ParallelContext):
    """One of two ranks that have equal parts."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 2
        return x * 2


@dataclass(frozen=True, slots=True)
class _FusedPair(_Pair):
    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        gained: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return x + residual, residual * eps, weight[None] if gained else None


def test_parts_of_ranks_are_summed_before_the_residual_is_added() -> None:
    norm = RMSNorm(32, EPS, place(_Pair(0, 2)))
    norm.weight.fill_(1.0)
    norm.prepare()
    part, residual = _random(5, 32), _random(5, 32, seed=2)
    out, stream = norm.compute(Stream(residual, part))
    expected = 2 * part + residual
    torch.testing.assert_close(stream.total, expected)
    torch.testing.assert_close(out.double(), rms_norm(expected, norm.weight, EPS))
    # Without a part the total is the whole stream already.
    assert torch.equal(norm.compute(Stream(residual))[1].total, residual)


@pytest.mark.parametrize("pair", [None, _Pair, _FusedPair])
def test_a_part_may_have_a_norm_before_it_is_added(pair: type[ParallelContext] | None) -> None:
    """Of the sum over ranks, so the ranks' fused sum and norm does not do."""
    here = place(pair(0, 2)) if pair else place()
    norm, post = RMSNorm(32, EPS, here), RMSNorm(32, 0.5, here, offset=1.0)
    for one in (norm, post):
        one.weight.copy_(_random(1, 32, seed=3)[0])
        one.prepare()
    part, total = _random(5, 32), _random(5, 32, seed=2)
    out, stream = norm.compute(Stream(total, part, post=post))
    added = rms_norm(part * (2 if pair else 1), 1 + _random(1, 32, seed=3)[0], 0.5)
    torch.testing.assert_close(stream.total, (total.double() + added).float(), rtol=1e-5, atol=1e-5)
    expected = rms_norm(stream.total, norm.weight, EPS)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert (stream.part, stream.post) == (None, None)


def test_no_norm_passes_the_stream_on() -> None:
    norm, post = NoNorm(32, place()), RMSNorm(32, 0.5, place())
    post.weight.fill_(2.0)
    for one in (norm, post):
        one.prepare()
    part, total = _random(5, 32), _random(5, 32, seed=2)
    out, stream = norm.compute(Stream(total))
    assert out is stream.total is total
    out, stream = norm.compute(Stream(total, part, post=post))
    torch.testing.assert_close(out, total + post.of(part))
    assert out is stream.total
    assert norm.weight_targets("norm") == {}
    layer = ColumnLinear(32, (4,), bias=False, place=place())
    assert layer.weight is not None
    weight = layer.weight.copy_(_random(4, 32, seed=3)).clone()
    layer.prepare(norm)
    torch.testing.assert_close(layer(norm(Stream(total)))[0], total @ weight.T)


def test_a_fused_sum_takes_the_place_of_everything() -> None:
    norm = RMSNorm(32, EPS, place(_FusedPair(0, 2)))
    part, total = _random(5, 32), _random(5, 32, seed=2)
    out, stream = norm.compute(Stream(total, part))
    assert stream.part is None
    assert torch.equal(out, part + total)
    assert torch.equal(stream.total, total * EPS)


@pytest.mark.parametrize("summands", [1, 2, 4])
@pytest.mark.parametrize("pair", [_Pair, _FusedPair])
def test_a_gained_stream_has_the_sum_over_ranks(
    monkeypatch: pytest.MonkeyPatch, pair: type[ParallelContext], summands: int
) -> None:
    """Summands of a product are added up in the order of the kernels, and rounded."""

    def gain_rows(
        x: torch.Tensor, weight: torch.Tensor, part: torch.Tensor, post: object, *, pdl: bool
    ) -> Any:
        assert not pdl
        assert post is None
        return x * weight, torch.ones(1, len(x)), x + part

    rows = SimpleNamespace(gain_rows=gain_rows)
    monkeypatch.setitem(sys.modules, "layers.kernels.rowwise", rows)
    here = place(pair(0, 2), torch.bfloat16)
    norm = RMSNorm(32, EPS, here)
    norm.weight.fill_(3.0)
    part = _random(summands, 5, 32) if summands > 1 else _random(5, 32).bfloat16()
    total = _random(5, 32, seed=2).bfloat16()
    gained, stream = norm.gained(Stream(total, part))
    assert stream.part is None
    assert gained.norm is norm
    assert gained.scale is not None
    if pair is _FusedPair:
        assert torch.equal(gained.values, part + total)
        assert torch.equal(gained.scale.squares, norm.weight[None])
        assert torch.equal(stream.total, total * EPS)
    else:
        if summands > 1:
            halves = part.view(-1, 2, 5, 32).sum(1)
            part = halves.sum(0).bfloat16()
        assert torch.equal(gained.values, total * 3)
        assert torch.equal(stream.total, total + 2 * part)
