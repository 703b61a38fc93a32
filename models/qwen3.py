"""Qwen3 dense (Qwen Team, 2025): normalised Q and K, optional biases."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM, DecoderSpec, check_supported


def model_shape(hf_config: Any) -> DecoderSpec:
    """The decoder that a `Qwen3Config` describes."""
    check_supported(hf_config)
    return DecoderSpec(
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        intermediate_size=hf_config.intermediate_size,
        num_layers=hf_config.num_hidden_layers,
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=hf_config.head_dim,
        rms_norm_eps=hf_config.rms_norm_eps,
        qkv_bias=hf_config.attention_bias,
        o_bias=hf_config.attention_bias,
        qk_norm=True,
        tied=hf_config.tie_word_embeddings,
    )


MODEL = DecoderLM
