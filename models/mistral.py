"""Mistral models (Jiang et al., 2023). All layers of v0.1 have a window, later ones have none."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    return decoder_spec(hf_config, windows="sliding_window")


MODEL = DecoderLM
