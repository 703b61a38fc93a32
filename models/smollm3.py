"""SmolLM3 (Hugging Face, 2025): some layers do not rotate Q and K (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    bias = hf_config.attention_bias
    listed = hf_config.no_rope_layers[: hf_config.num_hidden_layers]
    ropes = tuple("" if rotates else None for rotates in listed)
    return decoder_spec(hf_config, "layer_types", qkv_bias=bias, o_bias=bias, ropes=ropes)


MODEL = DecoderLM
