"""The decoder-only transformer of Llama, Mistral, Qwen, OLMo, Gemma and other models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from layers.attention.base import AttentionBackend
from layers.linear import ColumnLinear, QKVLinear, RowLinear, VocabEmbedding, VocabHead
from layers.norm_rope import Normed, QKNormRopeStore, RMSNorm, Stream
from layers.output_norms import NoNorm, WholeNormRopeStore
from layers.parallel import Place
from layers.rotary import RotaryEmbedding, query_scales, rotary_table
from memory.kv_cache import KVLayer
from models.base import CausalLM, ForwardBatch
from models.decoder_config import DecoderSpec
from utils.loader import WeightTarget


class Block(Protocol):
    """The interface of a layer's attention and MLP. A new model may implement it differently.

    `DecoderLayer` calls `mlp(normed)` and `attention(normed, batch, kv, rows)`. `kv` is the
    `KVLayer` of this layer. `rows`, int64 [R], are indices: only these tokens' stream is
    returned. None means all tokens. The attention must store K and V of all tokens in any case.
    """

    def __call__(self, normed: Normed, *args: Any, **kwargs: Any) -> Stream: ...

    def prepare(self, norm: RMSNorm, after: RMSNorm | None) -> None:
        """Prepare this block's layers.

        `norm` and `after` are the prepared norms of the block's input and of the resulting stream.
        `after` is None if the block's output has a norm before it is added to the stream.
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
        make: Any = WholeNormRopeStore if spec.qk_norm == "all" else QKNormRopeStore
        self.store = make(mine, mine_kv, head_dim, eps, place, spec.norm_offset)
        self.o_proj = RowLinear(heads * head_dim, hidden, bias=spec.o_bias, place=place)

    def __call__(
        self, normed: Normed, batch: ForwardBatch, kv: KVLayer, rows: Tensor | None = None
    ) -> Stream:
        """Return stream plus attention output of tokens `rows`, int64 [R], or of all if None."""
        qkv, stream = self.qkv_proj(normed)
        rotation = batch.rotations[self._rope]
        q = self.store(qkv, rotation, batch.slot_mapping[self._group], kv)
        if rotation.query_scale is not None:
            q = q.mul_(rotation.query_scale)
        out = self._backend.attend(q, kv, batch.attention[self._group])
        if rows is not None:
            out, stream = out.index_select(0, rows), Stream(stream.total.index_select(0, rows))
        return self.o_proj(out, stream)

    def prepare(self, norm: RMSNorm, after: RMSNorm | None) -> None:
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
    """Gated feed-forward block: down(f(gate(x)) * up(x)) for the activation f."""

    def __init__(self, spec: DecoderSpec, place: Place) -> None:
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self._fused, self._activation = spec.fused_weights, spec.activation
        self.gate_up_proj = ColumnLinear(hidden, (inner, inner), bias=False, place=place)
        self.down_proj = RowLinear(inner, hidden, bias=False, place=place)

    def __call__(self, normed: Normed) -> Stream:
        y, stream = self.gate_up_proj(normed)
        return self.down_proj(y, stream)

    def prepare(self, norm: RMSNorm, after: RMSNorm | None) -> None:
        self.gate_up_proj.prepare(norm, gate=self._activation)
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
    """A layer: norm, attention, norm, MLP. Outputs may have norms before they are added, too.

    `names` has the names of the norms in a checkpoint: of attention, its output, MLP, its output.
    """

    norm: RMSNorm
    attention: Block
    attention_norm: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: Block
    output_norm: RMSNorm | None
    names: tuple[str, str, str, str]

    def __call__(
        self, stream: Stream, batch: ForwardBatch, kv: KVLayer, rows: Tensor | None = None
    ) -> Stream:
        """Return the residual stream of the tokens `rows`, int64 [R], or all if `rows` is None."""
        stream = self.attention(self.norm(stream), batch, kv, rows)
        stream.post = self.attention_norm
        stream = self.mlp(self.mlp_norm(stream))
        stream.post = self.output_norm
        return stream

    @property
    def _norms(self) -> tuple[RMSNorm | None, ...]:
        return self.norm, self.attention_norm, self.mlp_norm, self.output_norm

    def prepare(self, after: RMSNorm) -> None:
        """Prepare all parts. `after` is the prepared norm of this layer's result."""
        for norm in self._norms:
            if norm is not None:
                norm.prepare()
        self.attention.prepare(self.norm, self.mlp_norm if self.attention_norm is None else None)
        self.mlp.prepare(self.mlp_norm, after if self.output_norm is None else None)

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        slots = self.attention.weight_targets(f"{name}.self_attn")
        for norm, theirs in zip(self._norms, self.names, strict=True):
            if norm is not None:
                slots |= norm.weight_targets(f"{name}.{theirs}_layernorm")
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
        scale = shape.embedding_scale
        if shape.rounds_scale:
            scale = float(torch.tensor(scale, dtype=place.dtype))
        self._ropes = shape.ropes or ("",) * shape.num_layers
        self._kinds = list(dict.fromkeys(self._ropes))
        # Before the layers, whose weights take memory: what cannot be rotated is refused here.
        rows = hf_config, shape.head_dim, max_model_len, place.device
        tables = [rotary_table(*rows, kind) for kind in self._kinds]
        scales = query_scales(hf_config, *rows[2:]) if shape.scales_queries else None
        self.rotary = RotaryEmbedding(*tables, gather=not place.fused, query_scale=scales)
        self.embed_tokens = VocabEmbedding(*size, place, scale)
        self.layers = [self.make_layer(i) for i in range(shape.num_layers)]
        self.norm = self.make_norm()
        self._head = self.embed_tokens if shape.tied else VocabEmbedding(*size, place)
        self.lm_head = VocabHead(self._head, place, shape.logit_scale)

    def make_layer(self, index: int) -> DecoderLayer:
        spec, mlp_norm = self.spec, "post_attention"
        inputs: list[RMSNorm] = [NoNorm(spec.hidden_size, self.place) for _ in range(2)]
        outputs: list[RMSNorm | None] = [None, None]
        if spec.norms != "after":
            inputs = [self.make_norm(), self.make_norm()]
        if spec.norms != "before":
            outputs, mlp_norm = [self.make_norm(), self.make_norm()], "pre_feedforward"
        names = ("input", "post_attention", mlp_norm, "post_feedforward")
        attention = inputs[0], self.make_attention(index), outputs[0]
        return DecoderLayer(*attention, inputs[1], self.make_mlp(index), outputs[1], names)

    def make_norm(self) -> RMSNorm:
        spec = self.spec
        return RMSNorm(spec.hidden_size, spec.rms_norm_eps, self.place, spec.norm_offset)

    def make_attention(self, index: int) -> Block:
        rope = self._kinds.index(self._ropes[index])
        group = self.spec.layer_groups[index]
        return Attention(self.spec, self.place, self.backend, rope, group)

    def make_mlp(self, index: int) -> Block:
        return MLP(self.spec, self.place)

    def __call__(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        return self.lm_head(self.norm(self._stream(batch)), batch.logits)

    def states(self, batch: ForwardBatch) -> Tensor:
        return self.norm.compute(self._stream(batch))[1].total

    def normed(self, states: Tensor) -> Tensor:
        return self.norm.compute(Stream(states))[0]

    def head(self, states: Tensor) -> Tensor:
        return self.lm_head(self.norm(Stream(states)))[0]

    def _stream(self, batch: ForwardBatch) -> Stream:
        stream = Stream(self.embed_tokens(batch.input_ids))
        for i, (layer, kv) in enumerate(zip(self.layers, batch.kv, strict=True)):
            if i in batch.inputs:
                batch.inputs[i] = layer.norm.compute(stream)[1].total * self.spec.stream_scale
            # The last layer stores all K and V, but returns only the stream of `sampled_rows`.
            rows = batch.sampled_rows if layer is self.layers[-1] else None
            stream = layer(stream, batch, kv, rows)
        return stream

    def prepare(self) -> None:
        self.norm.prepare()
        after = self.norm
        for layer in reversed(self.layers):
            layer.prepare(after)
            after = layer.norm
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
