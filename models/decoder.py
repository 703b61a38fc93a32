"""The pre-norm decoder-only transformer that the Qwen models are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layers.attention.base import AttentionBackend
from layers.embed_head import VocabEmbedding, VocabHead, VocabTable
from layers.forward_batch import ForwardBatch
from layers.kernels.launch import fused
from layers.layernorm import RMSNorm
from layers.linear import MergedColumnLinear, QKVLinear, RowLinear
from layers.parallel import ParallelContext
from layers.rotary_embedding import QKNormRopeStore, RotaryEmbedding, rotary_table
from memory.kv_cache import KVLayer
from models.base import CausalLM, ModelShape
from utils.errors import UnsupportedModelError
from utils.loader import WeightSlot


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec(ModelShape):
    """The shape of a decoder, over all ranks.

    Attributes:
        qkv_bias, o_bias: whether these projections have a bias.
        qk_norm: whether Q and K are normalised per head.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool


def check_supported(hf_config: Any) -> None:
    """Refuse what the config asks for and this decoder would silently get wrong.

    Raises:
        UnsupportedModelError: sliding-window layers, another activation than SiLU, quantised
            weights, or sizes that do not go together.
    """
    if hf_config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act={hf_config.hidden_act!r}: only 'silu' is built")
    # Configs of other architectures may have no layer_types, and then one window for all layers.
    all_layers = getattr(hf_config, "sliding_window", None) and "sliding_attention"
    kinds = set(getattr(hf_config, "layer_types", None) or [all_layers or "full_attention"])
    kinds.discard("full_attention")
    if kinds:
        raise UnsupportedModelError(
            f"layer_types contains {', '.join(sorted(kinds))}: only full_attention is built "
            "(for Qwen2 and Qwen3, set use_sliding_window=false if the context allows it)"
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        raise UnsupportedModelError("quantization_config: quantised checkpoints are not built")
    _check_sizes(hf_config)


def _check_sizes(hf_config: Any) -> None:
    heads, kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % kv_heads:
        raise UnsupportedModelError(f"{heads} query heads are no multiple of {kv_heads} KV heads")
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    if head_dim % 2:
        raise UnsupportedModelError(f"head_dim={head_dim}: rotations need an even number")
    if hf_config.num_hidden_layers < 1:
        raise UnsupportedModelError(f"num_hidden_layers={hf_config.num_hidden_layers}: no layer")


class Attention:
    """Norm and self-attention over the paged KV cache."""

    def __init__(
        self, spec: DecoderSpec, parallel: ParallelContext, backend: AttentionBackend, **where: Any
    ) -> None:
        self._backend = backend
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, parallel=parallel, **where)
        self.qkv_proj = QKVLinear(
            self.norm,
            spec.hidden_size,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            bias=spec.qkv_bias,
            parallel=parallel,
            **where,
        )
        self.store = QKNormRopeStore(
            parallel.share("query heads", spec.num_heads),
            parallel.kv_heads(spec.num_kv_heads)[1],
            spec.head_dim,
            spec.rms_norm_eps if spec.qk_norm else None,
            **where,
        )
        self.o_proj = RowLinear(
            spec.num_heads * spec.head_dim,
            spec.hidden_size,
            bias=spec.o_bias,
            parallel=parallel,
            **where,
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        kv: KVLayer,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream before and after; see `layers.product.Product` for its form.

        Args:
            rows: [R] int64: those to go on with, None for all.
        """
        qkv, total = self.qkv_proj.partial(x, residual)
        q = self.store(qkv, batch.rotation, batch.slot_mapping, kv)
        out = self._backend.attend(q, kv, batch.attention)
        if rows is not None:
            out, total = out.index_select(0, rows), total.index_select(0, rows)
        return self.o_proj(out, total)

    def finish(self) -> None:
        self.qkv_proj.finish()
        self.store.finish()
        self.o_proj.finish()


class MLP:
    """Norm and gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: DecoderSpec, parallel: ParallelContext, **where: Any) -> None:
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.norm = RMSNorm(hidden, spec.rms_norm_eps, parallel=parallel, **where)
        self.gate_up_proj = MergedColumnLinear(
            self.norm, hidden, (inner, inner), bias=False, parallel=parallel, **where
        )
        self.down_proj = RowLinear(inner, hidden, bias=False, parallel=parallel, **where)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The residual stream before and after; see `layers.product.Product` for its form."""
        y, total = self.gate_up_proj.gated(x, residual)
        return self.down_proj(y, total)

    def finish(self) -> None:
        self.gate_up_proj.finish()
        self.down_proj.finish()


class DecoderLayer:
    """Attention and MLP."""

    def __init__(
        self, spec: DecoderSpec, parallel: ParallelContext, backend: AttentionBackend, **where: Any
    ) -> None:
        self.self_attn = Attention(spec, parallel, backend, **where)
        self.mlp = MLP(spec, parallel, **where)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        kv: KVLayer,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Attention`."""
        x, residual = self.self_attn(x, residual, batch, kv, rows)
        return self.mlp(x, residual)

    def weight_slots(self, name: str) -> dict[str, WeightSlot]:
        attn, mlp, names = self.self_attn, self.mlp, f"{name}.self_attn"
        return {
            **attn.norm.weight_slots(f"{name}.input_layernorm"),
            **attn.qkv_proj.weight_slots(*(f"{names}.{p}_proj" for p in "qkv")),
            **attn.store.weight_slots(f"{names}.q_norm", f"{names}.k_norm"),
            **attn.o_proj.weight_slots(f"{names}.o_proj"),
            **mlp.norm.weight_slots(f"{name}.post_attention_layernorm"),
            **mlp.gate_up_proj.weight_slots(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
            **mlp.down_proj.weight_slots(f"{name}.mlp.down_proj"),
        }


class DecoderLM(CausalLM):
    """Embedding, layers, final norm and head.

    Args:
        shape: of the model.
        hf_config: the checkpoint's config, for the rotary frequencies.
        parallel: this rank's place.
        backend: attention, shared by all layers.
        max_model_len: positions of the rotary table.
    """

    def __init__(
        self,
        shape: DecoderSpec,
        hf_config: Any,
        *,
        parallel: ParallelContext,
        backend: AttentionBackend,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        where: dict[str, Any] = {"dtype": dtype, "device": device}
        spec = shape
        self._tied = spec.tied
        self._embedding = VocabTable(spec.vocab_size, spec.hidden_size, parallel=parallel, **where)
        self._head = (
            self._embedding
            if spec.tied
            else VocabTable(spec.vocab_size, spec.hidden_size, parallel=parallel, **where)
        )
        self.embed_tokens = VocabEmbedding(self._embedding, parallel)
        self.layers = [
            DecoderLayer(spec, parallel, backend, **where) for _ in range(spec.num_layers)
        ]
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, parallel=parallel, **where)
        self.lm_head = VocabHead(self.norm, self._head)
        table = rotary_table(hf_config, spec.head_dim, max_model_len, device)
        self.rotary = RotaryEmbedding(table, gather=not fused(device, dtype))

    def __call__(self, batch: ForwardBatch) -> Tensor:
        x: Tensor = self.embed_tokens(batch.input_ids)
        residual: Tensor | None = None
        *layers, last = self.layers
        *caches, last_cache = batch.kv
        for layer, kv in zip(layers, caches, strict=True):
            x, residual = layer(x, residual, batch, kv)
        # Of the last layer's rows only keys and values are needed where nothing is sampled.
        x, residual = last(x, residual, batch, last_cache, batch.sampled_rows)
        return self.lm_head(x, residual, batch.logits)

    def finish(self) -> None:
        for layer in self.layers:
            layer.self_attn.finish()
            layer.mlp.finish()
        self.lm_head.finish()

    def weight_slots(self) -> dict[str, WeightSlot]:
        """Where each tensor of a Hugging Face checkpoint goes; before `finish`."""
        slots = self._embedding.weight_slots("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            slots |= layer.weight_slots(f"model.layers.{i}")
        slots |= self.norm.weight_slots("model.norm")
        if not self._tied:
            slots |= self._head.weight_slots("lm_head")
        return slots
