"""The gate, and what the kernels of products are asked to compute."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import layers.kernels
from layers.linear import Matmul, gate_mul
from layers.norm_rope import Gained, RMSNorm, Scale, Stream
from layers.parallel import ParallelContext
from tests.layers.tensors import place

N, K = 32, 16
MOST_FUSED = 4


def test_silu_of_the_first_half_times_the_second() -> None:
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0)) * 5
    gate, up = x.double()[:, :12], x.double()[:, 12:]
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(
        gate_mul(x, "silu", place()).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_gelu_of_the_first_half_times_the_second() -> None:
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0)) * 5
    gate, up = x.double()[:, :12], x.double()[:, 12:]
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    expected = 0.5 * gate * (1 + torch.tanh(inner)) * up
    got = gate_mul(x, "gelu_tanh", place()).double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The kernel calls with their options. Products onto the stream take up to 4 tokens."""
    made: list[dict[str, Any]] = []

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        made.append({"kernel": "multiply", "bias": bias is not None, **options})
        n = weight.shape[0] // (2 if options.get("gate") else 1)
        return torch.zeros((2, len(x), n) if options.get("partial") else (len(x), n))

    def add(*work: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, _, bias, residual, norm_weight = work
        made.append({"kernel": "add", "bias": bias is not None, **options})
        return residual + 1, residual * norm_weight, torch.zeros(2, len(x))

    kernels = SimpleNamespace(
        MAX_FUSED_TOKENS=MOST_FUSED,
        multiply=multiply,
        add_product=add,
        parts_of=lambda n, k: 4 if (n, k) == (N, K) else 1,
        interleaved=lambda weight: weight.flip(0),
    )
    monkeypatch.setattr(layers.kernels, "products", kernels, raising=False)
    return made


@pytest.fixture
def exact(calls: list[dict[str, Any]]) -> Any:
    """`ExactMatmul` of a module that has imported the stand-ins for the kernels."""
    assert calls == []
    spec = importlib.util.find_spec("layers.exact_matmul")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ExactMatmul


def _norm(size: int, weight: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> RMSNorm:
    norm = RMSNorm(size, 1e-6, place(dtype=dtype))
    norm.weight.fill_(weight)
    norm.prepare()
    return norm


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tokens", [4, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_few_tokens_of_one_rank_meet_the_stream_in_the_product(
    calls: list[dict[str, Any]], exact: Any, biased: bool, tokens: int, size: int
) -> None:
    here = place(ParallelContext(0, size), torch.bfloat16)
    weight, bias = torch.ones(N, K, dtype=torch.bfloat16), torch.ones(N) if biased else None
    after = _norm(N, 3.0)
    matmul = exact(weight, bias, here, after)
    before = Stream(torch.ones(tokens, N, dtype=torch.bfloat16))
    result = matmul.added(torch.ones(tokens, K, dtype=torch.bfloat16), before)
    options = {"bias": biased, "parts": 4, "pdl": True}
    if size == 1 and tokens == 4:
        assert calls == [{"kernel": "add", **options}]
        assert result.part is None
        assert result.gained is not None
        assert torch.equal(result.total, before.total + 1)
        assert torch.equal(result.gained.values, torch.full_like(before.total, 3.0))
        gained, stream = after.gained(result)
        assert (gained, stream) == (result.gained, result)
    else:
        # Ranks add up their products before they meet the stream. Summands have no bias.
        assert calls == [{"kernel": "multiply", "partial": not biased, **options}]
        assert result.total is before.total
        assert result.part is not None
        assert result.gained is None
        assert result.part.dim() == (2 if biased else 3)


def test_another_norm_does_not_take_what_one_norm_has_made(
    exact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def gain_rows(x: Tensor, weight: Tensor, *_: Any, pdl: bool) -> tuple[Tensor, Tensor, Tensor]:
        made.append(pdl)
        return x * weight, torch.ones(1, len(x)), x

    monkeypatch.setattr(
        layers.kernels, "rowwise", SimpleNamespace(gain_rows=gain_rows), raising=False
    )
    monkeypatch.setitem(sys.modules, "layers.kernels.rowwise", layers.kernels.rowwise)
    matmul = exact(torch.ones(N, K), None, place(), _norm(N, 3.0))
    stream = matmul.added(torch.ones(2, K), Stream(torch.ones(2, N, dtype=torch.bfloat16)))
    other = _norm(N, 5.0)
    gained, _ = other.gained(stream)
    assert gained.norm is other
    assert torch.equal(gained.values, torch.full((2, N), 10.0))
    assert made == [False]


@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_scales_in_the_product(
    calls: list[dict[str, Any]], exact: Any, dtype: torch.dtype, gate: str | None
) -> None:
    norm = _norm(K, 2.0, dtype)
    matmul = exact(torch.ones(N, K), None, place(dtype=dtype), gate=gate)
    values = torch.ones(3, K, dtype=dtype)
    squares = torch.full((1, 3), 7.0)
    stream = Stream(values, gained=Gained(norm, values, norm.scale_of(squares)))
    y, after = matmul.normed(norm(stream))
    assert after is stream
    assert y.shape == (3, N // 2 if gate else N)
    gain = 1.0 if dtype == torch.bfloat16 else 2.0**-8
    [call] = calls
    assert call.pop("scale") == Scale(squares, K / gain, 1e-6 * gain)
    assert call == {"kernel": "multiply", "bias": False, "gate": gate, "out": None, "pdl": True}


def test_a_gate_is_stored_as_the_kernels_read_it(exact: Any) -> None:
    weight = torch.arange(N * K, dtype=torch.float32).view(N, K)
    assert torch.equal(exact(weight, None, place(), gate="silu").weight, weight.flip(0))
    assert torch.equal(exact(weight, None, place()).weight, weight)


@pytest.mark.parametrize("biased", [False, True])
def test_a_product_goes_where_it_is_wanted(biased: bool) -> None:
    weight, bias = torch.ones(N, K), torch.full((N,), 3.0)
    matmul = Matmul(weight, bias if biased else None, place())
    out = torch.empty(9, N)
    assert matmul(torch.ones(9, K), out=out) is out
    assert torch.equal(out, torch.full((9, N), K + (3.0 if biased else 0.0)))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_product_of_no_tokens(parts: int) -> None:
    """A step that ends no prompt draws no token. Nothing is launched, so no GPU is needed."""
    pytest.importorskip("triton")
    from layers.kernels.products import add_product, multiply

    x, weight = (torch.ones(n, 256, dtype=torch.bfloat16) for n in (0, 32))
    residual, gain = x.new_empty(0, 32), x.new_ones(32)
    assert multiply(x, weight, parts=parts).shape == (0, 32)
    total, gained, squares = add_product(x, weight, None, residual, gain, parts=parts)
    assert total.shape == gained.shape == (0, 32)
    assert total.dtype == gained.dtype == torch.bfloat16
    # One sum of squares for every 16 columns.
    assert (squares.shape, squares.dtype) == ((2, 0), torch.float32)
