"""OLMo 3 (Ai2, 2025): OLMo 2 with sliding windows, and a rotation for each kind of layer."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    bias, ropes = hf_config.attention_bias, tuple(hf_config.layer_types)
    about: dict[str, Any] = {"qk_norm": "all", "norms": "after", "ropes": ropes}
    return decoder_spec(hf_config, "layer_types", qkv_bias=bias, o_bias=bias, **about)


MODEL = DecoderLM
