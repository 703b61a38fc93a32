"""What a config asks for and nobody here would do is refused, not passed over."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen3Config

from models.decoder import DecoderSpec, decoder_spec
from utils.errors import UnsupportedModelError

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}


def _shape(model_type: str, **fields: Any) -> Any:
    config = CONFIGS[model_type](num_hidden_layers=2, **fields)
    return importlib.import_module(f"models.{model_type}").model_shape(config)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_sliding_windows(model_type: str) -> None:
    fields = {"sliding_window": 128, "max_window_layers": 1}
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        _shape(model_type, use_sliding_window=True, **fields)
    _shape(model_type, use_sliding_window=False, **fields)


def _config(**fields: Any) -> SimpleNamespace:
    """As transformers makes them for other architectures, unchecked."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    others = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return SimpleNamespace(**{**heads, **sizes, **others, **fields})


def _spec(config: Any) -> DecoderSpec:
    return decoder_spec(config, qkv_bias=False, o_bias=False, qk_norm=False)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 query heads"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"hidden_size": 60}, "head_dim=15"),
        ({"hidden_size": 3}, "head_dim=0"),
        # Without layer_types there is one window for all layers.
        ({"sliding_window": 4096}, "sliding_attention"),
    ],
)
def test_sizes_and_windows_of_unchecked_configs(fields: dict[str, Any], problem: str) -> None:
    assert _spec(_config()).head_dim == 16
    _spec(_config(sliding_window=None))
    with pytest.raises(UnsupportedModelError, match=problem):
        _spec(_config(**fields))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_other_activations(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="gelu"):
        _shape(model_type, hidden_act="gelu")


@pytest.mark.parametrize("model_type", CONFIGS)
def test_quantised_weights(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="quantis"):
        _shape(model_type, quantization_config={"quant_method": "fp8"})


def test_qwen2_has_biased_projections_and_no_norms_of_heads() -> None:
    shape = _shape("qwen2", hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    assert (shape.qkv_bias, shape.o_bias, shape.qk_norm) == (True, False, False)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 64)


@pytest.mark.parametrize("bias", [False, True])
def test_qwen3_has_norms_of_heads_and_the_biases_of_its_config(bias: bool) -> None:
    shape = _shape("qwen3", attention_bias=bias, head_dim=32, tie_word_embeddings=bias)
    assert (shape.qkv_bias, shape.o_bias, shape.qk_norm, shape.head_dim) == (bias, bias, True, 32)
    assert shape.tied == bias
