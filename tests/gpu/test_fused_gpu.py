"""The fused Triton kernels on a CUDA device: random shapes, poisoned outputs, graph capture."""

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from layers.kernels.rowwise import (
    qk_norm_rope_store,
    rms_norm,
    silu_mul,
)
from layers.kernels.sampling import sample_shard
from layers.kernels.small_batch_linear import (
    small_batch_linear,
    small_batch_splits,
    supports_small_batch_linear,
)
from layers.norm_rope import Rotation
from layers.sampler import gumbel_noise
from layers.sampler import sample_shard as sample_shard_reference
from memory.kv_cache import KVLayer
from tests.kernels.filters import check_bounds, hard_rows
from tests.kernels.interpreter import poisoned_memory
from tests.kernels.references import (
    qk_norm_rope_store_reference,
    rms_norm_reference,
    silu_mul_reference,
    small_batch_linear_reference,
)
from tests.layers.tensors import keys

pytestmark = pytest.mark.gpu

hopper = pytest.mark.skipif(
    torch.cuda.get_device_capability()[0] != 9, reason="needs compute capability 9.0"
)
PDL = torch.cuda.get_device_capability() >= (9, 0)
DTYPES = (torch.bfloat16, torch.float16)


def _randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within one rounding of the 16-bit output: both sides compute in float32."""
    assert got.isfinite().all()
    torch.testing.assert_close(got.float(), want.float(), rtol=1.6e-2, atol=1e-2)
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 1e-3, float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(6))
def test_norm(case: int, dtype: torch.dtype) -> None:
    rng = random.Random(case)
    tokens, size = rng.choice([1, 2, 17, 300]), rng.choice([64, 1024, 1536, 4096, 5120])
    x, residual = _randn(tokens, size, dtype=dtype), _randn(tokens, size, dtype=dtype)
    weight = _randn(size, dtype=dtype)
    for part in (None, x, _randn(rng.choice([2, 3, 8]), tokens, size, dtype=torch.float32)):
        with poisoned_memory():
            out, total = rms_norm(residual, weight, 1e-6, part, pdl=PDL)
        want = rms_norm_reference(residual, weight, 1e-6, part)
        if part is x:
            assert torch.equal(total, want[1])
        _close(total, want[1])
        _close(out, want[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 3072), (64, 8960), (700, 1000)])
def test_silu_mul(tokens: int, size: int, dtype: torch.dtype) -> None:
    x = _randn(tokens, 2 * size, dtype=dtype)
    with poisoned_memory():
        out = silu_mul(x, pdl=PDL)
    _close(out, silu_mul_reference(x))


@pytest.mark.parametrize("case", range(8))
def test_qk_norm_rope_store(case: int) -> None:
    rng = random.Random(case)
    heads, kv_heads = rng.choice([(16, 8), (12, 2), (32, 8), (7, 1), (4, 4)])
    dim, tokens = rng.choice([64, 80, 128]), rng.choice([1, 5, 64, 513, 700])
    block_size = rng.choice([16, 256])
    blocks = tokens // block_size + 3
    norm = rng.random() < 0.5
    splits = rng.choice([1, 2, 4])
    qkv = _randn(tokens, (heads + 2 * kv_heads) * dim)
    if splits > 1:
        qkv = _randn(splits, *qkv.shape, dtype=torch.float32)
    weights = (_randn(dim), _randn(dim)) if norm else None
    angle = _randn(4096, dim // 2, dtype=torch.float32)
    positions = torch.randint(0, 4096, (tokens,), device="cuda")
    rotation = Rotation(positions, angle.cos(), angle.sin())
    slots = torch.randperm(blocks * block_size, device="cuda")[:tokens].int()
    slots[torch.rand(tokens, device="cuda") < 0.2] = -1
    caches = _poisoned(blocks, block_size, 2, kv_heads, dim)
    want_caches = caches.clone()
    about = (qkv, weights, 1e-6, rotation, slots)
    want = qk_norm_rope_store_reference(*about, KVLayer.of(want_caches))
    with poisoned_memory():
        out = qk_norm_rope_store(*about, KVLayer.of(caches), pdl=PDL)
    _close(out, want)
    written = ~want_caches.isnan()
    assert torch.equal(written, ~caches.isnan())
    if written.any():
        _close(caches[written], want_caches[written])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 151_936), (9, 32_003), (70, 151_936), (300, 517)])
def test_sample(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits = _randn(rows, vocab, dtype=dtype) * 3
    temperature = torch.rand(rows, device="cuda") * 2
    temperature[::3] = 0
    seed = torch.randint(-(2**62), 2**62, (rows, 2), device="cuda")
    position = torch.randint(0, 2**20, (rows,), device="cuda", dtype=torch.int32)
    _, want = sample_shard_reference(logits, temperature, seed, position)
    _, got = sample_shard(logits, temperature, seed, position)
    # Another logarithm may swap two scores that are within 1e-4 of each other, no others.
    noise = gumbel_noise(seed, position, vocab) * temperature[:, None]
    score = logits.float() + noise
    gap = score.gather(1, want[:, None]) - score.gather(1, got[:, None])
    assert gap.abs().max() < 1e-4
    assert (got == want)[temperature == 0].all()
    kept = logits.float().sort(dim=1, descending=True).values[:, min(40, vocab - 1)]
    least = torch.where(temperature > 1, float("-inf"), kept)
    _, few = sample_shard(logits, temperature, seed, position, least=least)
    assert (logits.float().gather(1, few[:, None]).squeeze(1) >= least).all()
    allowed = score.masked_fill(logits.float() < least[:, None], float("-inf"))
    assert (allowed.amax(1) - allowed.gather(1, few[:, None]).squeeze(1)).max() < 1e-4
    cut = vocab // 8 * 4
    left = sample_shard(logits[:, :cut], temperature, seed, position)
    right = sample_shard(logits[:, cut:], temperature, seed, position, vocab_offset=cut)
    assert torch.equal(torch.where(right[0] > left[0], right[1], left[1]), got)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("vocab", [7, 32_003, 151_936])
def test_sample_without_a_choice(vocab: int, dtype: torch.dtype) -> None:
    logits = _randn(9, vocab, dtype=dtype)
    logits[3:8] = float("-inf")
    for row, column in enumerate((0, vocab // 2, vocab - 1, 0, vocab // 2, vocab - 1)):
        logits[row, column] = -float("nan") if row % 2 else float("nan")
    seed, position = keys(torch.arange(9, device="cuda")), torch.arange(9, device="cuda")
    for temperature in (0.0, 1.0):
        best, got = sample_shard(logits, torch.full((9,), temperature).cuda(), seed, position)
        assert got[:8].tolist() == [-1] * 8
        assert 0 <= got[8] < vocab
        assert best[:6].isnan().all()
        assert best[:6].view(torch.int32).gt(0).all()


def test_sampled_shares_follow_softmax() -> None:
    rows = 50_000
    logits = _randn(1, 16, dtype=torch.float32)
    seed = torch.arange(rows, device="cuda")
    temperature = torch.full((rows,), 0.8, device="cuda")
    position = torch.zeros_like(seed)
    _, drawn = sample_shard(logits.expand(rows, 16), temperature, keys(seed), position)
    share = drawn.bincount(minlength=16) / rows
    # Five standard errors of a share of 1/2.
    assert (share - torch.softmax(logits[0] / 0.8, 0)).abs().max() < 5 * (0.25 / rows) ** 0.5


def test_graph_capture_sees_new_inputs() -> None:
    logits, x, weight = _randn(4, 5000), _randn(4, 1024), _randn(1024)
    temperature = torch.tensor([0.0, 0.7, 1.0, 0.3], device="cuda")
    seed, position = keys(torch.arange(4, device="cuda")), torch.zeros(4, device="cuda").long()
    sample_shard(logits, temperature, seed, position)
    rms_norm(x, weight, 1e-6, pdl=PDL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, token = sample_shard(logits, temperature, seed, position)
        normed, _ = rms_norm(x, weight, 1e-6, pdl=PDL)
    for _ in range(3):
        logits.normal_()
        x.normal_()
        position += 1
        graph.replay()
        _, want = sample_shard_reference(logits, temperature, seed, position)
        assert torch.equal(token, want)
        _close(normed, rms_norm_reference(x, weight, 1e-6)[0])


# Outputs and inputs of the linears of Qwen3-0.6B, Qwen2-1.5B and Qwen3-8B, and odd ones.
BF16, FP16 = DTYPES
WIDE = [
    (4096, 1024, BF16),
    (2048, 1536, FP16),
    (6144, 4096, BF16),
    (48, 80, FP16),
    (1008, 3008, BF16),
]
NARROW = [(1024, 2048, FP16), (1024, 3072, BF16), (1536, 1536, BF16), (1536, 8960, BF16)]
GATED = [
    (3072, 1024, BF16),
    (3072, 1024, FP16),
    (8960, 1536, BF16),
    (12288, 4096, BF16),
    (80, 48, BF16),
]


def _linear_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Roundings of the 16-bit output and, with a norm, of the scaled 16-bit input.

    Each is 1.1e-3 (root mean square, bf16); with SwiGLU up to five of them meet.
    """
    assert got.isfinite().all()
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 8e-3, float(error)


def _weight(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return _randn(rows, columns, dtype=dtype) / float(columns**0.5)


@hopper
@pytest.mark.parametrize(("n", "k", "dtype"), WIDE + NARROW)
def test_small_batch_linear_few_tokens(n: int, k: int, dtype: torch.dtype) -> None:
    for tokens in (1, random.randint(2, 8), random.randint(9, 16)):
        x = _randn(tokens, k + 32, dtype=dtype)[:, :k]
        weight, bias = _weight(n, k, dtype), _randn(n, dtype=dtype)
        gain, residual = _randn(k, dtype=dtype), _randn(tokens, n, dtype=dtype)
        cases: list[dict[str, Any]] = [
            {},
            {"bias": bias, "norm_weight": gain},
            {"residual": residual},
            {"bias": bias, "norm_weight": gain, "residual": residual},
        ]
        for options in cases:
            out = _poisoned(tokens, n, dtype=dtype)
            small_batch_linear(x, weight, **options, out=out, pdl=True)
            _linear_close(out, small_batch_linear_reference(x, weight, **options))


@hopper
@pytest.mark.parametrize(("n", "k", "dtype"), GATED)
def test_small_batch_linear_swiglu(n: int, k: int, dtype: torch.dtype) -> None:
    weight, gain = _weight(2 * n, k, dtype), _randn(k, dtype=dtype)
    for tokens in (1, 7, 16, 17, 64, 65, random.randint(66, 255), 256):
        if not supports_small_batch_linear(tokens, n, k, swiglu=True):
            assert tokens > 16
            continue
        x = _randn(tokens, k, dtype=dtype)
        norm = gain if tokens <= 16 else None
        out = _poisoned(tokens, n, dtype=dtype)
        small_batch_linear(x, weight, norm_weight=norm, swiglu=True, out=out, pdl=True)
        _linear_close(out, small_batch_linear_reference(x, weight, norm_weight=norm, swiglu=True))


@hopper
@pytest.mark.parametrize(("n", "k", "dtype"), WIDE + NARROW)
def test_small_batch_linear_many_tokens(n: int, k: int, dtype: torch.dtype) -> None:
    weight, bias = _weight(n, k, dtype), _randn(n, dtype=dtype)
    for tokens in (17, 64, 65, 128, random.randint(129, 255), 256):
        x = _randn(tokens, k, dtype=dtype)
        splits = small_batch_splits(tokens, n, k)
        if supports_small_batch_linear(tokens, n, k):
            out = _poisoned(tokens, n, dtype=dtype)
            small_batch_linear(x, weight, bias, out=out, pdl=True)
            _linear_close(out, small_batch_linear_reference(x, weight, bias))
        if splits > 1 and supports_small_batch_linear(tokens, n, k, splits=splits):
            sums = _poisoned(splits, tokens, n, dtype=torch.float32)
            small_batch_linear(x, weight, splits=splits, out=sums, pdl=True)
            _linear_close(sums.sum(0), small_batch_linear_reference(x.float(), weight.float()))


@hopper
@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 128, 256])
def test_dependent_launch_changes_nothing(tokens: int) -> None:
    """A chain that uses memory again gives the same bits with and without early launch."""
    hidden, inner, layers = 1024, 3072, 12
    up = [_weight(2 * inner, hidden, torch.bfloat16) for _ in range(layers)]
    down = [_weight(hidden, inner, torch.bfloat16) for _ in range(layers)]
    gain = _randn(hidden).abs()
    start = _randn(tokens, hidden)
    splits = small_batch_splits(tokens, hidden, inner)
    act = _poisoned(tokens, inner)
    sums = _poisoned(splits, tokens, hidden, dtype=torch.float32)

    def chain(pdl: bool) -> torch.Tensor:
        # What the norms and linears return comes from memory that the allocator gets back here.
        state = start.clone()
        for i in range(layers):
            if tokens <= 16:
                small_batch_linear(state, up[i], norm_weight=gain, swiglu=True, out=act, pdl=pdl)
                state = small_batch_linear(act, down[i], residual=state, pdl=pdl)
            else:
                normed, _ = rms_norm(state, gain, 1e-6, pdl=pdl)
                small_batch_linear(normed, up[i], swiglu=True, out=act, pdl=pdl)
                small_batch_linear(act, down[i], splits=splits, out=sums, pdl=pdl)
                _, state = rms_norm(state, gain, 1e-6, sums, pdl=pdl)
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


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 151_936), (256, 151_936), (33, 4096)])
def test_logit_bounds(rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits = _randn(rows, vocab_size, dtype=dtype) * 3
    logits[::5] = logits[::5].round()
    check_bounds(logits, rows)
    hard = hard_rows(vocab_size, dtype).cuda()
    for seed in range(3):
        check_bounds(hard.repeat(-(-rows // len(hard)), 1), seed)
    # Rows that are not aligned.
    check_bounds(logits[:, 1:], rows)
