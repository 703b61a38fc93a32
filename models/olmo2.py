"""OLMo 2 (Walsh et al., 2024): norms of the outputs, and norms of all heads of Q and of K."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    bias = hf_config.attention_bias
    return decoder_spec(hf_config, qkv_bias=bias, o_bias=bias, qk_norm="all", norms="after")


MODEL = DecoderLM
