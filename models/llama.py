"""Llama 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024), SmolLM2 and other models."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    bias = hf_config.attention_bias
    return decoder_spec(hf_config, qkv_bias=bias, o_bias=bias)


MODEL = DecoderLM
