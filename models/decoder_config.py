"""Reads the sizes of a decoder from a config, and refuses what `DecoderLM` does not build."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderSpec
from utils.errors import UnsupportedModelError


def decoder_spec(hf_config: Any, **others: Any) -> DecoderSpec:
    """Read a decoder's sizes from a config whose fields have the names that Qwen and Llama use.

    `others` are fields of the `DecoderSpec`. They may replace what is read from the config.

    Raises UnsupportedModelError for activations other than silu, layers with neither full attention
    nor a sliding window, biases of the MLP, quantised weights, head sizes not divisible by 2, or
    query heads not divisible by KV heads. The caller must refuse other settings that `DecoderLM`
    lacks. `open_checkpoint` has already refused numbers that make no sense, such as 0 layers.
    """
    if hf_config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act={hf_config.hidden_act!r}: only 'silu' is built")
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
    fields = {
        "vocab_size": hf_config.vocab_size,
        "hidden_size": hf_config.hidden_size,
        "intermediate_size": hf_config.intermediate_size,
        "num_layers": hf_config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": hf_config.rms_norm_eps,
        "tied": hf_config.tie_word_embeddings,
        "windows": _windows(hf_config),
    }
    return DecoderSpec(**(fields | others))


def _windows(hf_config: Any) -> tuple[int | None, ...]:
    """Return each layer's window, or () if all layers have full attention."""
    window, count = getattr(hf_config, "sliding_window", None), hf_config.num_hidden_layers
    # If a config has no layer_types, its sliding_window applies to all layers.
    all_layers = "sliding_attention" if window else "full_attention"
    kinds = list(getattr(hf_config, "layer_types", None) or [all_layers] * count)
    known = {"full_attention": None, "sliding_attention": window}
    if others := sorted(set(kinds) - set(known)):
        raise UnsupportedModelError(
            f"layer_types contains {', '.join(others)}: only full_attention and sliding_attention "
            "are built"
        )
    if len(kinds) != count:
        raise UnsupportedModelError(f"layer_types has {len(kinds)} entries for {count} layers")
    if "sliding_attention" in kinds and (not isinstance(window, int) or window < 1):
        raise UnsupportedModelError(f"sliding_window={window!r}: a window is an integer above 0")
    return tuple(known[kind] for kind in kinds) if "sliding_attention" in kinds else ()
