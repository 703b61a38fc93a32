"""The pre-norm decoder-only transformer of the Qwen2 and Qwen3 models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from layers.attention.base import AttentionBackend
from layers.linear import ColumnLinear, QKVLinear, RowLinear, VocabEmbedding, VocabHead
from layers.norm_rope import Normed, QKNormRopeStore, RMSNorm, RotaryEmbedding, Stream, rotary_table
from layers.parallel import Place
from memory.kv_cache import KVLayer
from models.base import CausalLM, ForwardBatch, ModelShape
from utils.errors import UnsupportedModelError
from utils.loader import WeightTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec(ModelShape):
    """Sizes of a decoder, over all ranks. If `qk_norm`, each head of Q and K is RMS-normalised."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool


def decoder_spec(hf_config: Any, *, qkv_bias: bool, o_bias: bool, qk_norm: bool) -> DecoderSpec:
    """Read a decoder's sizes from a config whose fields have the names that Qwen and Llama use.

    Raises UnsupportedModelError for activations other than silu, layers without full attention,
    quantised weights, head sizes not divisible by 2, or query heads not divisible by KV heads. The
    caller must refuse other settings that `DecoderLM` lacks, such as `logits_scaling`.
    `open_checkpoint` has already refused numbers that make no sense, such as 0 layers.
    """
    if hf_config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act={hf_config.hidden_act!r}: only 'silu' is built")
    # If a config has no layer_types, its sliding_window applies to all layers.
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
    heads, kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % kv_heads:
        raise UnsupportedModelError(f"{heads} query heads are no multiple of {kv_heads} KV heads")
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    if head_dim < 2 or head_dim % 2:
        raise UnsupportedModelError(f"head_dim={head_dim}: rotations need an even number")
    return DecoderSpec(
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        intermediate_size=hf_config.intermediate_size,
        num_layers=hf_config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=hf_config.rms_norm_eps,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
        tied=hf_config.tie_word_embeddings,
    )


class Block(Protocol):
    """The interface of a layer's attention and MLP. A new model may implement it differently.

    `DecoderLayer` calls `mlp(normed)` and `attention(normed, batch, kv, rows)`. `kv` is the
    `KVLayer` of this layer. `rows`, int64 [R], are indices: only these tokens' stream is
    returned. None means all tokens. The attention must store K and V of all tokens in any case.
    """

    def __call__(self, normed: Normed, *args: Any, **kwargs: Any) -> Stream: ...

    def prepare(self, norm: RMSNorm, after: RMSNorm) -> None:
        """Prepare this block's layers.

        `norm` and `after` are the prepared norms of the block's input and of the resulting stream.
        """

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        """Map the checkpoint's tensor names that begin with `name` to this object's weights."""


class Attention:
    """Self-attention over the paged KV cache."""

    def __init__(self, spec: DecoderSpec, place: Place, backend: AttentionBackend) -> None:
        hidden, heads, head_dim = spec.hidden_size, spec.num_heads, spec.head_dim
        self._backend = backend
        sizes = hidden, heads, spec.num_kv_heads, head_dim
        self.qkv_proj = QKVLinear(*sizes, bias=spec.qkv_bias, place=place)
        mine = place.parallel.per_rank("query heads", heads)
        mine_kv = place.parallel.kv_heads(spec.num_kv_heads)[1]
        eps = spec.rms_norm_eps if spec.qk_norm else None
        self.store = QKNormRopeStore(mine, mine_kv, head_dim, eps, place)
        self.o_proj = RowLinear(heads * head_dim, hidden, bias=spec.o_bias, place=place)

    def __call__(
        self, normed: Normed, batch: ForwardBatch, kv: KVLayer, rows: Tensor | None = None
    ) -> Stream:
        """Return stream plus attention output of tokens `rows`, int64 [R], or of all if None."""
        qkv, stream = self.qkv_proj(normed)
        q = self.store(qkv, batch.rotation, batch.slot_mapping, kv)
        out = self._backend.attend(q, kv, batch.attention)
        if rows is not None:
            out, stream = out.index_select(0, rows), Stream(stream.total.index_select(0, rows))
        return self.o_proj(out, stream)

    def prepare(self, norm: RMSNorm, after: RMSNorm) -> None:
        self.qkv_proj.prepare(norm)
        self.store.prepare()
        self.o_proj.prepare(after)
        self.exact = self.qkv_proj.exact and self.o_proj.exact

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        slots = self.qkv_proj.weight_targets(*(f"{name}.{p}_proj" for p in "qkv"))
        slots |= self.store.weight_targets(f"{name}.q_norm", f"{name}.k_norm")
        return slots | self.o_proj.weight_targets(f"{name}.o_proj")


class MLP:
    """Gated feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: DecoderSpec, place: Place) -> None:
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.gate_up_proj = ColumnLinear(hidden, (inner, inner), bias=False, place=place)
        self.down_proj = RowLinear(inner, hidden, bias=False, place=place)

    def __call__(self, normed: Normed) -> Stream:
        y, stream = self.gate_up_proj(normed)
        return self.down_proj(y, stream)

    def prepare(self, norm: RMSNorm, after: RMSNorm) -> None:
        self.gate_up_proj.prepare(norm, gated=True)
        self.down_proj.prepare(after)
        self.exact = self.gate_up_proj.exact and self.down_proj.exact

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        slots = self.gate_up_proj.weight_targets(f"{name}.gate_proj", f"{name}.up_proj")
        return slots | self.down_proj.weight_targets(f"{name}.down_proj")


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """A layer: norm, attention, norm, MLP."""

    input_norm: RMSNorm
    attention: Block
    post_attention_norm: RMSNorm
    mlp: Block

    def __call__(
        self, stream: Stream, batch: ForwardBatch, kv: KVLayer, rows: Tensor | None = None
    ) -> Stream:
        """Return the residual stream of the tokens `rows`, int64 [R], or all if `rows` is None."""
        stream = self.attention(self.input_norm(stream), batch, kv, rows)
        return self.mlp(self.post_attention_norm(stream))

    def prepare(self, after: RMSNorm) -> None:
        """Prepare all parts. `after` is the prepared norm of this layer's result."""
        self.input_norm.prepare()
        self.post_attention_norm.prepare()
        self.attention.prepare(self.input_norm, self.post_attention_norm)
        self.mlp.prepare(self.post_attention_norm, after)

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        slots = self.input_norm.weight_targets(f"{name}.input_layernorm")
        slots |= self.attention.weight_targets(f"{name}.self_attn")
        slots |= self.post_attention_norm.weight_targets(f"{name}.post_attention_layernorm")
        return slots | self.mlp.weight_targets(f"{name}.mlp")


class DecoderLM(CausalLM):
    """Embedding, layers, final norm and head. Subclasses may override `make_*` methods."""

    def __init__(
        self,
        shape: DecoderSpec,
        hf_config: Any,
        *,
        place: Place,
        backend: AttentionBackend,
        max_model_len: int,
    ) -> None:
        self.spec, self.place, self.backend = shape, place, backend
        size = shape.vocab_size, shape.hidden_size
        self.embed_tokens = VocabEmbedding(*size, place)
        self.layers = [self.make_layer(i) for i in range(shape.num_layers)]
        self.norm = self.make_norm()
        self._head = self.embed_tokens if shape.tied else VocabEmbedding(*size, place)
        self.lm_head = VocabHead(self._head, place)
        table = rotary_table(hf_config, shape.head_dim, max_model_len, place.device)
        self.rotary = RotaryEmbedding(table, gather=not place.fused)

    def make_layer(self, index: int) -> DecoderLayer:
        attention, mlp = self.make_attention(index), self.make_mlp(index)
        return DecoderLayer(self.make_norm(), attention, self.make_norm(), mlp)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.spec.hidden_size, self.spec.rms_norm_eps, self.place)

    def make_attention(self, index: int) -> Block:
        return Attention(self.spec, self.place, self.backend)

    def make_mlp(self, index: int) -> Block:
        return MLP(self.spec, self.place)

    def __call__(self, batch: ForwardBatch) -> Tensor:
        stream = Stream(self.embed_tokens(batch.input_ids))
        *layers, last = self.layers
        *caches, last_cache = batch.kv
        for layer, kv in zip(layers, caches, strict=True):
            stream = layer(stream, batch, kv)
        # The last layer stores all K and V, but returns only the stream of `sampled_rows`.
        stream = last(stream, batch, last_cache, batch.sampled_rows)
        return self.lm_head(self.norm(stream), batch.logits)

    def prepare(self) -> None:
        self.norm.prepare()
        after = self.norm
        for layer in reversed(self.layers):
            layer.prepare(after)
            after = layer.input_norm
        self.lm_head.prepare(self.norm)
        # A subclass may have layers that were not measured.
        self.exact = type(self).exact or (
            type(self) is DecoderLM
            and all(
                getattr(part, "exact", False)
                for layer in self.layers
                for part in (layer.attention, layer.mlp, self.lm_head)
            )
        )

    def weight_targets(self) -> dict[str, WeightTarget]:
        slots = self.embed_tokens.weight_targets("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            slots |= layer.weight_targets(f"model.layers.{i}")
        slots |= self.norm.weight_targets("model.norm")
        if self._head is not self.embed_tokens:
            slots |= self._head.weight_targets("lm_head")
        return slots
