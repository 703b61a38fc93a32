"""Mistral models (Jiang et al., 2023) whose config has no sliding window, as from v0.2 on."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec


def model_shape(hf_config: Any) -> DecoderSpec:
    return decoder_spec(hf_config)


MODEL = DecoderLM
