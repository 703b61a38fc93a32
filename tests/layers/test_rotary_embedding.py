"""Rotation against transformers' own, for every rope type."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from engine.types import KVGeometry
from layers.norm_rope import QKNormRopeStore
from layers.rotary import RotaryEmbedding, rotary_table
from memory.kv_cache import KVCache
from tests.layers.tensors import CPU, place
from utils.errors import UnsupportedModelError

HEAD_DIM = 64
MAX_LEN = 200
MAX_POSITION = 128
FACTORS = {
    "short_factor": [1.0 + 0.05 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [2.0 + 0.1 * i for i in range(HEAD_DIM // 2)],
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50},
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 50,
        "attention_factor": 0.7,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope-long": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 50,
        **FACTORS,
    },
    "longrope-short": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 400,
        **FACTORS,
    },
}


def _config(rope: dict[str, Any]) -> Any:
    return Qwen3Config(
        head_dim=HEAD_DIM,
        hidden_size=80,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )


def _reference(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' cosines and sines of a sequence of MAX_LEN tokens, [1, MAX_LEN, HEAD_DIM]."""
    rotary = Qwen3RotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(MAX_LEN).unsqueeze(0))
    return cos, sin


@pytest.mark.parametrize("name", ROPES)
def test_table_equals_transformers(name: str) -> None:
    config = _config(ROPES[name])
    cos, sin = _reference(config)
    table = rotary_table(config, HEAD_DIM, MAX_LEN, CPU)
    assert table.shape == (2, MAX_LEN, 1, HEAD_DIM)
    half = HEAD_DIM // 2
    torch.testing.assert_close(table[0, :, 0], cos[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table[1, :, 0, half:], sin[0, :, half:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table[1, :, 0, :half], -sin[0, :, :half], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in ROPES if n != "default"])
def test_every_type_differs_from_the_default(name: str) -> None:
    plain = rotary_table(_config(ROPES["default"]), HEAD_DIM, MAX_LEN, CPU)
    assert (rotary_table(_config(ROPES[name]), HEAD_DIM, MAX_LEN, CPU) - plain).abs().max() > 0.1


def test_dynamic_without_growth_is_the_default() -> None:
    plain = rotary_table(_config(ROPES["default"]), HEAD_DIM, MAX_POSITION, CPU)
    assert torch.equal(rotary_table(_config(ROPES["dynamic"]), HEAD_DIM, MAX_POSITION, CPU), plain)


def test_an_unknown_type_is_refused_by_name() -> None:
    config = _config(ROPES["default"])
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1.0}
    with pytest.raises(UnsupportedModelError, match="spiral"):
        rotary_table(config, HEAD_DIM, MAX_LEN, CPU)


def test_parameters_by_kind_of_layer_are_refused() -> None:
    parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = SimpleNamespace(rope_parameters=parameters)
    with pytest.raises(UnsupportedModelError, match="full_attention"):
        rotary_table(config, HEAD_DIM, MAX_LEN, CPU)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {},
        {"rope_type": "default", "rope_theta": "10000"},
        {"rope_type": "default", "rope_theta": None},
        {"rope_type": "default", "rope_theta": 0},
        {"rope_type": "default", "rope_theta": -2.0},
        {"rope_type": "default", "rope_theta": float("nan")},
        {"rope_type": ["yarn"], "rope_theta": 1e4},
        {"rope_type": None, "rope_theta": 1e4},
        {**ROPES["linear"], "rope_theta": 1e4, "factor": "4.0"},
        {**ROPES["linear"], "rope_theta": 1e4, "factor": 0},
        {**ROPES["yarn"], "rope_theta": 1e4, "attention_factor": float("nan")},
        {"rope_type": "llama3", "rope_theta": 1e4},
        {**ROPES["longrope-long"], "rope_theta": 1e4, "long_factor": [1.0] * 31},
        {**ROPES["longrope-long"], "rope_theta": 1e4, "long_factor": None},
        # A part of each head would be rotated.
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {**ROPES["linear"], "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_parameters_that_give_no_table_are_refused(rope: Any) -> None:
    config = _config({"rope_type": "default"})
    config.rope_parameters = rope
    with pytest.raises(UnsupportedModelError, match="rope"):
        rotary_table(config, HEAD_DIM, MAX_LEN, CPU)


def _pages() -> Any:
    geometry = KVGeometry(1, 2, HEAD_DIM, 16, 8, 4)
    (layer,) = KVCache(geometry, torch.float32, CPU).layers()
    layer.flat.fill_(float("nan"))
    return layer


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("name", ["default", "yarn"])
def test_norm_rotation_and_store_equal_transformers(name: str, qk_norm: bool) -> None:
    num_heads, num_kv_heads, rows = 4, 2, 11
    config = _config(ROPES[name])
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, (num_heads + 2 * num_kv_heads) * HEAD_DIM, generator=generator)
    positions = torch.randint(MAX_LEN, (rows,), generator=generator)
    targets = torch.randperm(8 * 16, generator=generator)[:rows]
    weights = torch.rand(2, HEAD_DIM, generator=generator) + 0.5

    eps = 1e-6 if qk_norm else None
    store = QKNormRopeStore(num_heads, num_kv_heads, HEAD_DIM, eps, place())
    slots = store.weight_targets("q", "k")
    assert set(slots) == ({"q.weight", "k.weight"} if qk_norm else set())
    for slot, weight in zip(slots.values(), weights, strict=False):
        slot.target.copy_(weight)
    store.prepare()
    rotary = RotaryEmbedding(rotary_table(config, HEAD_DIM, MAX_LEN, CPU), gather=True)
    layer = _pages()
    q, k, v = (
        part.view(rows, -1, HEAD_DIM)
        for part in torch.split(qkv.clone(), [n * HEAD_DIM for n in (num_heads, 2, 2)], dim=-1)
    )
    (rotation,) = rotary.prepare(positions)
    out = store(qkv, rotation, targets, layer)

    if qk_norm:
        norms = [Qwen3RMSNorm(HEAD_DIM, eps=1e-6) for _ in range(2)]
        for norm, weight in zip(norms, weights, strict=True):
            norm.weight.data = weight
        with torch.no_grad():
            q, k = norms[0](q), norms[1](k)
    cos, sin = (table[:, positions] for table in _reference(config))
    q, k = apply_rotary_pos_emb(q.unsqueeze(0), k.unsqueeze(0), cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(out, q[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.flat[targets, :2], k[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.flat[targets, 2:], v)
    untouched = torch.ones(128, dtype=torch.bool)
    untouched[targets] = False
    assert layer.flat[untouched].isnan().all()


def test_a_rotation_is_looked_up_by_position() -> None:
    table = rotary_table(_config(ROPES["default"]), HEAD_DIM, MAX_LEN, CPU)
    positions = torch.tensor([5, 0, 199, 5])
    (rotation,) = RotaryEmbedding(table, gather=True).prepare(positions)
    assert torch.equal(rotation.cos, table[0][positions])
    assert torch.equal(rotation.sin, table[1][positions])


@pytest.mark.parametrize("gather", [True, False])
def test_each_kind_of_layer_has_its_own_rotation(gather: bool) -> None:
    """In the order of the tables, whether torch or a kernel rotates."""
    tables = [
        rotary_table(_config(ROPES[name]), HEAD_DIM, MAX_LEN, CPU) for name in ("default", "theta")
    ]
    positions = torch.tensor([7, 150])
    found = RotaryEmbedding(*tables, gather=gather).prepare(positions)
    for table, rotation in zip(tables, found, strict=True):
        (alone,) = RotaryEmbedding(table, gather=gather).prepare(positions)
        assert torch.equal(rotation.cos, alone.cos)
        assert torch.equal(rotation.sin, alone.sin)
    assert not torch.equal(found[0].cos, found[1].cos)


def test_a_kernel_gets_the_whole_table_in_halves() -> None:
    config = _config(ROPES["yarn"])
    cos, sin = _reference(config)
    rotary = RotaryEmbedding(rotary_table(config, HEAD_DIM, MAX_LEN, CPU), gather=False)
    (rotation,) = rotary.prepare(torch.tensor([3]))
    torch.testing.assert_close(rotation.cos, cos[0, :, : HEAD_DIM // 2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rotation.sin, sin[0, :, : HEAD_DIM // 2], rtol=1e-6, atol=1e-6)
