from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from layers.layernorm import RMSNorm, RMSNormalizer
from layers.parallel import ParallelContext
from tests.layers.tensors import CPU, rms_norm

EPS = 1e-6


def _norm(size: int, dtype: torch.dtype = torch.float32, eps: float = EPS) -> RMSNorm:
    norm = RMSNorm(size, eps, parallel=ParallelContext(), dtype=dtype, device=CPU)
    norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    norm.finish()
    return norm


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4, 1e15])
@pytest.mark.parametrize("size", [1, 64, 96])
def test_equals_the_formula_in_float64(size: int, scale: float) -> None:
    norm = _norm(size)
    x = _random(9, size) * scale
    out, total = norm(x, None)
    expected = rms_norm(x, norm.weight, EPS)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(total, x)


def test_adds_to_the_residual_first() -> None:
    norm = _norm(32)
    x, residual = _random(5, 32), _random(5, 32, seed=2)
    out, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    expected = rms_norm(x + residual, norm.weight, EPS)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_a_row_of_zeros_stays_zero(eps: float) -> None:
    out, _ = _norm(32, eps=eps)(torch.zeros(2, 32), None)
    assert torch.equal(out, torch.zeros(2, 32))


def test_eps_counts_where_the_input_is_small() -> None:
    norm = _norm(32, eps=1e-2)
    x = torch.full((1, 32), 1e-2)
    expected = rms_norm(x, norm.weight, 1e-2)
    torch.testing.assert_close(norm(x, None)[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    norm = _norm(64, torch.bfloat16)
    x = _random(9, 64).bfloat16()
    out, _ = norm(x, None)
    assert out.dtype == torch.bfloat16
    expected = rms_norm(x, norm.weight, EPS).bfloat16()
    torch.testing.assert_close(out, expected, rtol=2**-8, atol=0)


def test_rows_are_independent() -> None:
    norm = _norm(32)
    x = _random(9, 32)
    rows = torch.cat([norm(row.unsqueeze(0), None)[0] for row in x])
    torch.testing.assert_close(norm(x, None)[0], rows)


def test_the_scale_can_be_handed_on() -> None:
    norm = _norm(32)
    x = _random(9, 32)
    expected, _ = norm(x, None)
    scale = norm.take_scale()
    torch.testing.assert_close(norm(x, None)[0] * scale, expected)


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
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x + residual, residual * eps


@pytest.mark.parametrize("splits", [1, 3])
def test_parts_of_ranks_are_summed_before_the_residual_is_added(splits: int) -> None:
    norm = RMSNorm(32, EPS, parallel=_Pair(0, 2), dtype=torch.float32, device=CPU)
    norm.weight.fill_(1.0)
    norm.finish()
    parts, residual = _random(splits, 5, 32), _random(5, 32, seed=2)
    out, total = norm(parts[0] if splits == 1 else parts, residual)
    expected = 2 * parts.sum(0) + residual
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(out.double(), rms_norm(expected, norm.weight, EPS))
    # Without a residual x is the whole stream already.
    assert torch.equal(norm(residual, None)[1], residual)


def test_a_fused_sum_takes_the_place_of_everything() -> None:
    norm = RMSNorm(32, EPS, parallel=_FusedPair(0, 2), dtype=torch.float32, device=CPU)
    x, residual = _random(5, 32), _random(5, 32, seed=2)
    out, total = norm(x, residual)
    assert torch.equal(out, x + residual)
    assert torch.equal(total, residual * EPS)
