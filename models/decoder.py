"""The pre-norm decoder-only transformer of Llama, Mistral, Qwen and other models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from layers.attention.base import AttentionBackend
from layers.linear import ColumnLinear, QKVLinear, RowLinear, VocabEmbedding, VocabHead
from layers.norm_rope import Normed, QKNormRopeStore, RMSNorm, RotaryEmbedding, Stream
from layers.parallel import Place
from layers.rotary import rotary_table
from memory.kv_cache import KVLayer
from models.base import CausalLM, ForwardBatch, ModelShape
from utils.loader import WeightTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec(ModelShape):
    """Sizes of a decoder, over all ranks, and how its layers differ.

    Attributes:
        qk_norm: whether each head of Q and K is RMS-normalised.
        ropes: each layer's `kind` for `rotary_table`. Empty means "" for all layers.
        embedding_scale, logit_scale: factors of the embeddings and of the logits.
        fused_weights: whether the checkpoint has one weight `qkv_proj` and one `gate_up_proj`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    ropes: tuple[str | None, ...] = ()
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    fused_weights: bool = False


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
    """Self-attention over the paged KV cache. `rope`, `group`: indices of rotation, cache group."""

    def __init__(
        self,
        spec: DecoderSpec,
        place: Place,
        backend: AttentionBackend,
        rope: int = 0,
        group: int = 0,
    ) -> None:
        hidden, heads, head_dim = spec.hidden_size, spec.num_heads, spec.head_dim
        self._backend, self._fused = backend, spec.fused_weights
        self._rope, self._group = rope, group
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
        q = self.store(qkv, batch.rotations[self._rope], batch.slot_mapping[self._group], kv)
        out = self._backend.attend(q, kv, batch.attention[self._group])
        if rows is not None:
            out, stream = out.index_select(0, rows), Stream(stream.total.index_select(0, rows))
        return self.o_proj(out, stream)

    def prepare(self, norm: RMSNorm, after: RMSNorm) -> None:
        self.qkv_proj.prepare(norm)
        self.store.prepare()
        self.o_proj.prepare(after)
        self.exact = self.qkv_proj.exact and self.o_proj.exact

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        if self._fused:
            slots = self.qkv_proj.fused_target(f"{name}.qkv_proj")
        else:
            slots = self.qkv_proj.weight_targets(*(f"{name}.{p}_proj" for p in "qkv"))
        slots |= self.store.weight_targets(f"{name}.q_norm", f"{name}.k_norm")
        return slots | self.o_proj.weight_targets(f"{name}.o_proj")


class MLP:
    """Gated feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: DecoderSpec, place: Place) -> None:
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self._fused = spec.fused_weights
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
        if self._fused:
            slots = self.gate_up_proj.fused_target(f"{name}.gate_up_proj")
        else:
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
        self.embed_tokens = VocabEmbedding(*size, place, shape.embedding_scale)
        self._ropes = shape.ropes or ("",) * shape.num_layers
        self._kinds = list(dict.fromkeys(self._ropes))
        self.layers = [self.make_layer(i) for i in range(shape.num_layers)]
        self.norm = self.make_norm()
        self._head = self.embed_tokens if shape.tied else VocabEmbedding(*size, place)
        self.lm_head = VocabHead(self._head, place, shape.logit_scale)
        rows = hf_config, shape.head_dim, max_model_len, place.device
        tables = [rotary_table(*rows, kind) for kind in self._kinds]
        self.rotary = RotaryEmbedding(*tables, gather=not place.fused)

    def make_layer(self, index: int) -> DecoderLayer:
        attention, mlp = self.make_attention(index), self.make_mlp(index)
        return DecoderLayer(self.make_norm(), attention, self.make_norm(), mlp)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.spec.hidden_size, self.spec.rms_norm_eps, self.place)

    def make_attention(self, index: int) -> Block:
        rope = self._kinds.index(self._ropes[index])
        group = self.spec.layer_groups[index]
        return Attention(self.spec, self.place, self.backend, rope, group)

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
        self.exact = type(self) is DecoderLM and all(
            getattr(part, "exact", False)
            for layer in self.layers
            for part in (layer.attention, layer.mlp, self.lm_head)
        )

    def weight_targets(self) -> dict[str, WeightTarget]:
        slots = self.embed_tokens.weight_targets("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            slots |= layer.weight_targets(f"model.layers.{i}")
        slots |= self.norm.weight_targets("model.norm")
        if self._head is not self.embed_tokens:
            slots |= self._head.weight_targets("lm_head")
        return slots
