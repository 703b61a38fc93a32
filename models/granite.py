"""Granite 3 dense models (IBM, 2024): Llama with factors for embeddings, layers, and logits.

A layer adds `residual_multiplier` r times its output to the stream. The engine divides the stream
by r instead: the embeddings are divided by r, outputs are added as they are, and a norm, which does
not depend on the length of its input, has eps / r**2 in place of eps.
"""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderLM
from models.decoder_config import DecoderSpec, decoder_spec
from utils.errors import UnsupportedModelError


def model_shape(hf_config: Any) -> DecoderSpec:
    bias, factor = hf_config.attention_bias, hf_config.residual_multiplier
    for name in ("residual_multiplier", "logits_scaling"):
        if getattr(hf_config, name) <= 0:
            raise UnsupportedModelError(f"{name}={getattr(hf_config, name)} must be positive")
    return decoder_spec(
        hf_config,
        qkv_bias=bias,
        o_bias=bias,
        score_scale=hf_config.attention_multiplier,
        rms_norm_eps=hf_config.rms_norm_eps / factor**2,
        embedding_scale=hf_config.embedding_multiplier / factor,
        logit_scale=1 / hf_config.logits_scaling,
        stream_scale=factor,
    )


MODEL = DecoderLM
