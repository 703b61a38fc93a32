"""The fused Triton kernels on a CUDA device: random shapes, poisoned outputs, graph capture."""

import random

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from layers.kernels.rowwise import (
    gate_mul,
    qk_norm_rope_store,
    rms_norm,
)
from layers.kernels.sampling import sample_shard
from layers.rotary import Rotation
from layers.sampler import gumbel_noise
from layers.sampler import sample_shard as sample_shard_reference
from memory.kv_cache import KVLayer
from tests.kernels.filters import check_bounds, hard_rows
from tests.kernels.interpreter import poisoned_memory
from tests.kernels.references import (
    gate_mul_reference,
    qk_norm_rope_store_reference,
    rms_norm_reference,
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
    for part in (None, x, _randn(rng.choice([2, 4]), tokens, size, dtype=torch.float32)):
        with poisoned_memory():
            out, total = rms_norm(residual, weight, 1e-6, part, pdl=PDL)
        want = rms_norm_reference(residual, weight, 1e-6, part)
        if part is x:
            assert torch.equal(total, want[1])
        _close(total, want[1])
        _close(out, want[0])
        if part is not None:
            post = _randn(size, dtype=torch.float32), 0.5
            with poisoned_memory():
                out, total = rms_norm(residual, weight, 1e-6, part, post, pdl=PDL)
            want = rms_norm_reference(residual, weight, 1e-6, part, post)
            _close(total, want[1])
            _close(out, want[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 3072), (64, 8960), (700, 1000)])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gate_mul(tokens: int, size: int, dtype: torch.dtype, gate: str) -> None:
    x = _randn(tokens, 2 * size, dtype=dtype)
    with poisoned_memory():
        out = gate_mul(x, gate, pdl=PDL)
    _close(out, gate_mul_reference(x, gate))


@pytest.mark.parametrize("case", range(8))
def test_qk_norm_rope_store(case: int) -> None:
    rng = random.Random(case)
    heads, kv_heads = rng.choice([(16, 8), (12, 2), (32, 8), (7, 1), (4, 4)])
    dim, tokens = rng.choice([64, 80, 128]), rng.choice([1, 5, 64, 513, 700])
    block_size = rng.choice([16, 256])
    blocks = tokens // block_size + 3
    norm = rng.random() < 0.5
    qkv = _randn(tokens, (heads + 2 * kv_heads) * dim)
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
