"""An architecture whose layers differ from Qwen's replaces a block, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Gemma3TextConfig, Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from engine.types import KVGeometry
from layers.attention.base import AttentionBackend, AttentionSpec
from layers.norm_rope import Normed, RMSNorm, Stream
from memory.kv_cache import KVCache
from models import gemma3_text
from models.base import ForwardBatch
from models.decoder import Block, DecoderLM
from models.decoder_config import decoder_spec
from tests.layers.tensors import CPU, place
from utils.loader import WeightTarget

HIDDEN, VOCAB, TOKENS = 32, 48, 5


class _Nothing(AttentionBackend):
    """Attends to nothing, so that attention adds zeros."""

    name = "nothing"

    def __init__(self, spec: AttentionSpec | None = None) -> None:
        pass

    def prepare(self, batch: Any) -> None:
        pass

    def attend(self, q: Tensor, kv: Any, prepared: Any) -> Tensor:
        return torch.zeros(q.shape[0], q.shape[1] * q.shape[2])


class _Negate:
    """A block without weights that subtracts twice the normalised stream."""

    def __call__(self, normed: Normed) -> Stream:
        x, stream = normed.norm.compute(normed.stream)
        return Stream(stream.total, -2.0 * x)

    def prepare(self, norm: RMSNorm, after: RMSNorm | None) -> None:
        pass

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        return {}


class _Negating(DecoderLM):
    def make_mlp(self, index: int) -> Block:
        return _Negate() if index else super().make_mlp(index)


def test_an_architecture_replaces_the_mlp_of_a_layer() -> None:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    spec = decoder_spec(config, qkv_bias=False, o_bias=False)
    model = _Negating(spec, config, place=place(), backend=_Nothing(), max_model_len=16)
    slots = model.weight_targets()
    assert {name for name in slots if ".mlp." in name} == {
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    generator = torch.Generator().manual_seed(0)
    for name, slot in slots.items():
        slot.target.normal_(generator=generator)
        if name.endswith("layernorm.weight") or "layers.0.mlp.down" in name:
            slot.target.fill_(1.0 if name.endswith("layernorm.weight") else 0.0)
    embedding, norm, head = (
        slots[f"{name}.weight"].target.clone()
        for name in ("model.embed_tokens", "model.norm", "lm_head")
    )
    model.prepare()

    pages = KVCache(KVGeometry(2, 1, 16, 16, 1, 4), torch.float32, CPU).layers()
    positions = torch.arange(TOKENS)
    rows = torch.tensor([4, 1])
    logits, states = model(
        ForwardBatch(positions, (positions,), model.rotary.prepare(positions), (None,), pages, rows)
    )

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + spec.rms_norm_eps).sqrt()

    x = embedding[rows]
    expected = rms(x - 2.0 * rms(x)) * norm @ head.t()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, x - 2.0 * rms(x), rtol=1e-4, atol=1e-4)


def test_gemma3_rounds_the_factor_of_its_embeddings_as_transformers_does() -> None:
    """In float32 nothing is rounded, so the comparisons of logits cannot tell."""
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=80,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    where = place(dtype=torch.bfloat16)
    shape = gemma3_text.model_shape(config)
    model = DecoderLM(shape, config, place=where, backend=_Nothing(), max_model_len=16)
    weight = torch.randn(VOCAB, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    model.weight_targets()["model.embed_tokens.weight"].target.copy_(weight)
    theirs = Gemma3TextScaledWordEmbedding(VOCAB, 80, 0, embed_scale=80**0.5).bfloat16()
    theirs.weight.data = weight
    tokens = torch.arange(VOCAB)
    assert torch.equal(model.embed_tokens(tokens), theirs(tokens))
