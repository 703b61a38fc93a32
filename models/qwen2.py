"""Qwen2 and Qwen2.5 dense models (Qwen Team, 2024): the QKV projections have biases."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    return decoder_spec(hf_config, windows="layer_types", qkv_bias=True)


MODEL = DecoderLM
