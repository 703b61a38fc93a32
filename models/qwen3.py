"""Qwen3 dense models (Qwen Team, 2025): Q and K are normalised, attention biases are optional."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    bias = hf_config.attention_bias
    return decoder_spec(hf_config, "layer_types", qkv_bias=bias, o_bias=bias, qk_norm="heads")


MODEL = DecoderLM
