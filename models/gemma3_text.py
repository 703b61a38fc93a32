"""Gemma 3 text models (Gemma Team, 2025): norms before and after, and a gate by GELU."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec
from utils.errors import UnsupportedModelError


def model_shape(hf_config: Any) -> DecoderSpec:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(hf_config, name, None) is not None:
            raise UnsupportedModelError(f"{name}={getattr(hf_config, name)} is not built")
    if getattr(hf_config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(
            "use_bidirectional_attention=True: only causal attention is built"
        )
    bias = hf_config.attention_bias
    return decoder_spec(
        hf_config,
        windows="layer_types",
        activation_field="hidden_activation",
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="heads",
        norms="both",
        norm_offset=1.0,
        ropes=tuple(hf_config.layer_types),
        score_scale=hf_config.query_pre_attn_scalar**-0.5,
        embedding_scale=hf_config.hidden_size**0.5,
        rounds_scale=True,
    )


MODEL = DecoderLM
