"""Sizes of a decoder, read from a config. What `DecoderLM` does not build is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from models.base import ModelShape
from utils.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec(ModelShape):
    """Sizes of a decoder, over all ranks, and how its layers differ.

    Attributes:
        qk_norm: what is RMS-normalised: "" for nothing, "heads" for each head of Q and K, "all"
            for all heads of Q together and all heads of K together.
        norms: where norms are: "before" attention and MLP, "after" them (of outputs), or "both".
        norm_offset: what is added to the weights of norms.
        activation: the gate of the MLP, as in `gate_mul`.
        ropes: each layer's `kind` for `rotary_table`. Empty means "" for all layers.
        scales_queries: whether queries have the factor `query_scales`, which follows the position.
        embedding_scale, logit_scale: factors of the embeddings and of the logits. The embeddings'
            factor is rounded to the model's dtype first if `rounds_scale`.
        stream_scale: factor between the residual stream and that of the published model.
        fused_weights: whether the checkpoint has one weight `qkv_proj` and one `gate_up_proj`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["", "heads", "all"] = ""
    norms: Literal["before", "after", "both"] = "before"
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    ropes: tuple[str | None, ...] = ()
    scales_queries: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    rounds_scale: bool = False
    stream_scale: float = 1.0
    fused_weights: bool = False


# Names of activations in a config, and as gates (layers/linear.py).
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def decoder_spec(
    hf_config: Any,
    windows: Literal["", "sliding_window", "layer_types"] = "",
    activation_field: str = "hidden_act",
    **others: Any,
) -> DecoderSpec:
    """Read a decoder's sizes from a config whose fields have the names that Qwen and Llama use.

    `windows` is the field that says which layers have a sliding window: "" for none, whatever the
    config has, "sliding_window" for all layers, "layer_types" for those that it names.
    `activation_field` is the field that names the gate of the MLP. `others` are fields of the
    `DecoderSpec`. They may replace what is read from the config.

    Raises UnsupportedModelError for activations other than SiLU and GELU by tanh, layers with
    neither full attention nor a sliding window, biases of the MLP, quantised weights, head sizes
    not divisible by 2, or query heads not divisible by KV heads. The caller must refuse other
    settings that `DecoderLM` lacks. `open_checkpoint` has already refused numbers that make no
    sense, such as 0 layers.
    """
    if not getattr(hf_config, "is_causal", True):
        raise UnsupportedModelError("is_causal=False: only causal attention is built")
    activation = getattr(hf_config, activation_field)
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UnsupportedModelError(f"{activation_field}={activation!r}: only {known} are built")
    if getattr(hf_config, "mlp_bias", False):
        raise UnsupportedModelError("mlp_bias=True: only MLPs without biases are built")
    if getattr(hf_config, "quantization_config", None) is not None:
        raise UnsupportedModelError("quantization_config: quantised checkpoints are not built")
    heads, kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % kv_heads:
        raise UnsupportedModelError(f"{heads} query heads are no multiple of {kv_heads} KV heads")
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    if head_dim < 2 or head_dim % 2:
        raise UnsupportedModelError(f"head_dim={head_dim}: rotations need an even number")
    sizes = {
        "vocab_size": hf_config.vocab_size,
        "hidden_size": hf_config.hidden_size,
        "intermediate_size": hf_config.intermediate_size,
        "num_layers": hf_config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": hf_config.rms_norm_eps,
        "activation": _ACTIVATIONS[activation],
        "tied": hf_config.tie_word_embeddings,
        "windows": _windows(hf_config, windows),
    }
    spec = DecoderSpec(**(sizes | others))
    if "ropes" in others and len(spec.ropes) != spec.num_layers:
        given = f"{len(spec.ropes)} layers of {spec.num_layers}"
        raise UnsupportedModelError(f"layer_types or no_rope_layers tell the rotation of {given}")
    return spec


def _windows(hf_config: Any, field: str) -> tuple[int | None, ...]:
    """Return each layer's window, or () if all layers have full attention."""
    if not field:
        return ()
    window, count = getattr(hf_config, "sliding_window", None), hf_config.num_hidden_layers
    all_layers = "full_attention" if window is None else "sliding_attention"
    named = getattr(hf_config, "layer_types", None) if field == "layer_types" else None
    kinds = list(named or [all_layers] * count)
    known = {"full_attention": None, "sliding_attention": window}
    if others := sorted(set(kinds) - set(known)):
        raise UnsupportedModelError(
            f"layer_types contains {', '.join(others)}: only full_attention and sliding_attention "
            "are built"
        )
    if len(kinds) != count:
        raise UnsupportedModelError(f"layer_types has {len(kinds)} entries for {count} layers")
    if "sliding_attention" in kinds and (not isinstance(window, int) or window < 1):
        # Qwen's config classes set sliding_window to None if use_sliding_window is false.
        used = getattr(hf_config, "use_sliding_window", None)
        told = "" if used is None else f" with use_sliding_window={used}"
        raise UnsupportedModelError(f"sliding_window={window!r}{told}: give an integer above 0")
    return tuple(known[kind] for kind in kinds) if "sliding_attention" in kinds else ()
