"""The gate, and which parts of a product the kernels for small batches are asked to compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import layers.kernels
from layers.linear import SmallBatchMatmul, silu_mul
from layers.norm_rope import RMSNorm, Stream
from layers.parallel import ParallelContext
from tests.layers.tensors import place

N, K = 32, 16
MOST_FUSED, MOST = 4, 8


def test_silu_of_the_first_half_times_the_second() -> None:
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0)) * 5
    gate, up = x.double()[:, :12], x.double()[:, 12:]
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(silu_mul(x, place()).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The options of each kernel call; kernels take up to 8 tokens, fuse up to 4."""
    made: list[set[str]] = []

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        made.append({name for name, value in options.items() if value is not None})
        shape = (x.shape[0], weight.shape[0] // (2 if "swiglu" in options else 1))
        return torch.zeros((options["splits"], *shape) if "splits" in options else shape)

    def supports(tokens: int, n: int, k: int, *, swiglu: bool, splits: int) -> bool:
        return tokens <= MOST and (n, k) == (N // 2 if swiglu else N, K)

    kernels = SimpleNamespace(
        MAX_FUSED_TOKENS=MOST_FUSED,
        small_batch_linear=run,
        supports_small_batch_linear=supports,
        small_batch_splits=lambda tokens, n, k: 3 if tokens > MOST_FUSED else 1,
    )
    monkeypatch.setattr(layers.kernels, "small_batch_linear", kernels, raising=False)
    return made


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [4, 5, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [False, True])
def test_a_norm_without_a_sum_is_fused_for_few_bfloat16_tokens(
    calls: list[set[str]], part: bool, dtype: torch.dtype, tokens: int, gated: bool
) -> None:
    here = place(dtype=dtype)
    matmul = SmallBatchMatmul(torch.ones(N, K, dtype=dtype), None, here)
    norm = RMSNorm(K, 1e-6, here)
    norm.weight.fill_(1.0)
    norm.prepare()
    norm.prepare()
    total = torch.ones(tokens, K, dtype=dtype)
    stream = Stream(total, total.clone() if part else None)
    _, after = (matmul.gated if gated else matmul.normed)(norm(stream))
    assert after.part is None
    assert torch.equal(after.total, torch.full_like(total, 2.0 if part else 1.0))
    fused = {"norm_weight", "eps"} if tokens == 4 and not part and dtype == torch.bfloat16 else {}
    assert calls == ([] if tokens == 9 else [{"pdl", *fused, *(["swiglu"] if gated else [])}])


@pytest.mark.parametrize("tokens", [4, 5, 9])
@pytest.mark.parametrize("size", [1, 2])
def test_a_residual_is_added_for_few_tokens_of_one_rank(
    calls: list[set[str]], size: int, tokens: int
) -> None:
    here = place(ParallelContext(0, size), torch.bfloat16)
    matmul = SmallBatchMatmul(torch.ones(N, K, dtype=torch.bfloat16), None, here)
    before = Stream(torch.ones(tokens, N, dtype=torch.bfloat16))
    after = matmul.added(torch.ones(tokens, K, dtype=torch.bfloat16), before)
    fused = size == 1 and tokens == 4
    assert (after.part is None) == fused
    assert fused or after.total is before.total
    option = {4: {"residual"} if fused else set(), 5: {"splits"}, 9: set()}[tokens]
    assert calls == ([] if tokens == 9 else [{"pdl", *option}])


def test_no_sums_are_left_where_the_kernel_normalises(calls: list[set[str]]) -> None:
    here = place(dtype=torch.bfloat16)
    matmul = SmallBatchMatmul(torch.ones(N, K, dtype=torch.bfloat16), None, here)
    norm = RMSNorm(K, 1e-6, here)
    norm.weight.fill_(1.0)
    norm.prepare()
    stream = Stream(torch.ones(5, K, dtype=torch.bfloat16))
    y, _ = matmul.normed(norm(stream), partial=True)
    assert (y.dim(), calls) == (2, [{"pdl"}])


def test_a_bias_is_added_once_and_before_the_gate(calls: list[set[str]]) -> None:
    """Sums that are left to be added up have none, and the kernel's gate would come before it."""
    here = place(dtype=torch.bfloat16)
    bias = torch.ones(N, dtype=torch.bfloat16)
    matmul = SmallBatchMatmul(torch.ones(N, K, dtype=torch.bfloat16), bias, here)
    norm = RMSNorm(K, 1e-6, here)
    norm.weight.fill_(1.0)
    norm.prepare()
    x = torch.ones(5, K, dtype=torch.bfloat16)
    assert matmul.partial(x).shape == (5, N)
    assert matmul.gated(norm(Stream(x)))[0].shape == (5, N // 2)
    assert calls == [{"pdl"}, {"pdl"}]


@pytest.mark.parametrize("biased", [False, True])
def test_a_product_goes_where_it_is_wanted(calls: list[set[str]], biased: bool) -> None:
    weight, bias = torch.ones(N, K), torch.full((N,), 3.0)
    matmul = SmallBatchMatmul(weight, bias if biased else None, place())
    matmul(torch.ones(5, K), out=torch.empty(5, N))
    assert calls == [{"pdl", "out"}]
    out = torch.empty(9, N)
    assert matmul(torch.ones(9, K), out=out) is out
    assert torch.equal(out, torch.full((9, N), K + (3.0 if biased else 0.0)))
