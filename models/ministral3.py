"""Ministral 3, text (Mistral AI, 2025): queries are scaled by their positions, as in Llama 4."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    return decoder_spec(hf_config, windows="sliding_window", scales_queries=True)


MODEL = DecoderLM
