"""Ministral 8B (Mistral AI, 2024): sliding windows in some layers."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    return decoder_spec(hf_config, windows="layer_types")


MODEL = DecoderLM
