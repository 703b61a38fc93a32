"""Qwen2 and Qwen2.5 dense (Qwen Team, 2024): biased QKV projections."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM, DecoderSpec, check_supported


def model_shape(hf_config: Any) -> DecoderSpec:
    """The decoder that a `Qwen2Config` describes."""
    check_supported(hf_config)
    head_dim = getattr(hf_config, "head_dim", None)
    return DecoderSpec(
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        intermediate_size=hf_config.intermediate_size,
        num_layers=hf_config.num_hidden_layers,
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim or hf_config.hidden_size // hf_config.num_attention_heads,
        rms_norm_eps=hf_config.rms_norm_eps,
        qkv_bias=True,
        o_bias=False,
        qk_norm=False,
        tied=hf_config.tie_word_embeddings,
    )


MODEL = DecoderLM
