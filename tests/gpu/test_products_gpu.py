"""Products on a Hopper GPU: the same bits for any number of tokens, by every kernel."""

import random

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a CUDA device of compute capability 9.0", allow_module_level=True)

from torch import Tensor

from layers.kernels.products import add_product, interleaved, multiply, parts_of
from layers.kernels.rowwise import gain_rows
from layers.norm_rope import GAIN, Scale
from tests.kernels.plain_product import plain_product
from tests.kernels.references import product_reference

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
# Numbers of tokens on both sides of every border between kernels and tiles.
TOKENS = (1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 256, 257, 320, 512, 1000, 2100)
MOST = max(TOKENS)
# Outputs and inputs: of Qwen3-0.6B, Qwen2-1.5B, Qwen3-8B, SmolLM2-135M, and odd ones.
COLUMNS = [
    (4096, 1024, BF16),
    (2048, 1536, FP16),
    (6144, 4096, BF16),
    (960, 576, BF16),
    (49155, 576, BF16),
    (336, 200, FP16),
]
GATED = [(3072, 1024, BF16), (8960, 1536, BF16), (1536, 576, FP16), (12288, 4096, BF16)]
ROWS = [
    (1024, 2048, BF16),
    (1024, 3072, FP16),
    (1536, 8960, BF16),
    (4096, 4096, BF16),
    (896, 896, BF16),
    (576, 576, BF16),
]


def _definition(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    out = torch.full((len(x), len(weight)), float("nan"), device="cuda", dtype=x.dtype)
    return plain_product(x, weight, out, parts=parts)


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _weight(n: int, k: int, dtype: torch.dtype) -> Tensor:
    return _randn(n, k, dtype=dtype) / float(k**0.5)


def _poisoned(tokens: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.full((tokens, n), float("nan"), device="cuda", dtype=dtype)


def _close(got: Tensor, want: Tensor) -> None:
    assert got.isfinite().all()
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 8e-3, float(error)


@pytest.mark.parametrize(("n", "k", "dtype"), COLUMNS + ROWS)
def test_every_kernel_has_the_bits_of_the_definition(n: int, k: int, dtype: torch.dtype) -> None:
    weight, all_x = _weight(n, k, dtype), _randn(MOST, k + 16, dtype=dtype)[:, :k]
    for parts in {1, parts_of(n, k)}:
        want, ones = _definition(all_x, weight, parts), weight[:1].new_ones(n)
        _close(want, product_reference(all_x, weight))
        for tokens in TOKENS:
            start = random.randint(0, MOST - tokens)
            x, rows = all_x[start : start + tokens], want[start : start + tokens]
            out = _poisoned(tokens, n, dtype)
            got = multiply(x, weight, parts=parts, out=out, pdl=True)
            assert torch.equal(got, rows), (tokens, parts)
            if parts > 1:
                summands = multiply(x, weight, parts=parts, partial=True, pdl=True)
                zero = torch.zeros_like(rows)
                part = summands if summands.dim() == 3 else got
                _, _, total = gain_rows(zero, ones, part, pdl=True)
                assert torch.equal(total, rows), (tokens, parts)


@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "k", "dtype"), COLUMNS + GATED)
def test_scales_biases_and_gates_have_the_same_bits(
    n: int, k: int, dtype: torch.dtype, biased: bool, gate: str | None
) -> None:
    if gate and (biased or n % 16 or (n, k, dtype) not in GATED):
        pytest.skip("a gate has no bias")
    plain = _weight(2 * n if gate else n, k, dtype)
    weight = interleaved(plain) if gate else plain
    bias = _randn(n, dtype=dtype) if biased else None
    stream, gain = 3 * _randn(MOST, k, dtype=dtype), _randn(k, dtype=dtype).abs() + 0.5
    torch.cuda.synchronize()  # with `pdl`, no kernel just before may write the norm's weight
    gained, squares, _ = gain_rows(stream, gain, pdl=True)
    factor = GAIN[dtype] ** 2
    scale = Scale(squares, k / factor, 1e-6 * factor)
    want = multiply(gained, weight, bias, scale=scale, gate=gate, pdl=True)
    norm = torch.nn.functional.rms_norm(stream.float(), (k,), gain.float(), 1e-6).to(dtype)
    _close(want, product_reference(norm, plain, bias, gate=gate))
    for tokens in TOKENS:
        start = random.randint(0, MOST - tokens)
        rows = slice(start, start + tokens)
        mine = scale._replace(squares=squares[:, rows].contiguous())
        out = _poisoned(tokens, n, dtype)
        multiply(gained[rows], weight, bias, scale=mine, gate=gate, out=out, pdl=True)
        assert torch.equal(out, want[rows]), tokens


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "k", "dtype"), ROWS)
def test_a_product_on_the_stream_has_the_bits_of_its_steps(
    n: int, k: int, dtype: torch.dtype, biased: bool
) -> None:
    parts = parts_of(n, k)
    if parts == 1:
        pytest.skip("not divided into parts")
    weight, gain = _weight(n, k, dtype), _randn(n, dtype=dtype)
    bias = _randn(n, dtype=dtype) if biased else None
    after = _weight(512, n, dtype)
    factor = GAIN[dtype] ** 2
    for tokens in (1, 5, 8, 11, 16):
        x, residual = _randn(tokens, k, dtype=dtype), _randn(tokens, n, dtype=dtype)
        fused = add_product(x, weight, bias, residual, gain, parts=parts, pdl=True)
        part = multiply(x, weight, bias, parts=parts, pdl=True)
        gained, squares, total = gain_rows(residual, gain, part, pdl=True)
        assert torch.equal(fused[0], total)
        assert torch.equal(fused[1], gained)
        scales = (Scale(s, n / factor, 1e-6 * factor) for s in (fused[2], squares))
        first, second = (multiply(gained, after, scale=s, pdl=True) for s in scales)
        assert torch.equal(first, second)


@pytest.mark.parametrize("tokens", [1, 8, 16, 24, 64, 128, 256, 300])
def test_dependent_launch_changes_nothing(tokens: int) -> None:
    """A chain that uses memory again gives the same bits with and without early launch."""
    hidden, inner, layers = 1024, 3072, 12
    up = [interleaved(_weight(2 * inner, hidden, BF16)) for _ in range(layers)]
    down = [_weight(hidden, inner, BF16) for _ in range(layers)]
    gain = _randn(hidden, dtype=BF16).abs()
    start = _randn(tokens, hidden, dtype=BF16)

    def chain(pdl: bool) -> Tensor:
        # What the products return comes from memory that the allocator gets back here.
        gained, squares, state = gain_rows(start.clone(), gain, pdl=pdl)
        for i in range(layers):
            scale = Scale(squares, hidden, 1e-6)
            act = multiply(gained, up[i], scale=scale, gate="silu", pdl=pdl)
            if tokens <= 16:
                state, gained, squares = add_product(
                    act, down[i], None, state, gain, parts=4, pdl=pdl
                )
            else:
                part = multiply(act, down[i], parts=4, partial=True, pdl=pdl)
                gained, squares, state = gain_rows(state, gain, part, pdl=pdl)
        return state

    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(True)
    for _ in range(20):
        start.normal_()
        want = chain(False).clone()
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, want)
