"""Phi-3 and Phi-3.5 models (Abdin et al., 2024): checkpoints with fused projections."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    return decoder_spec(hf_config, windows="sliding_window", fused_weights=True)


MODEL = DecoderLM
