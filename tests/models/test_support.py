"""What a config asks for and nobody here would do is refused, not passed over."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from layers.output_norms import WholeNormRopeStore
from layers.parallel import ParallelContext
from layers.rotary import query_scales
from models.decoder_config import DecoderSpec, decoder_spec
from tests.layers.tensors import place
from utils.errors import ConfigError, UnsupportedModelError

_ACTIVATION = {"gemma3_text": "hidden_activation"}
QWEN = ("qwen2", "qwen3")
OTHERS = (
    "llama",
    "mistral",
    "smollm3",
    "granite",
    "phi3",
    "olmo2",
    "olmo3",
    "gemma3_text",
    "ministral",
    "ministral3",
)
FAMILIES = (*QWEN, *OTHERS)


def _shape(model_type: str, **fields: Any) -> Any:
    if model_type == "mistral":
        fields = {"sliding_window": None, **fields}
    if model_type in ("olmo3", "gemma3_text", "ministral"):
        fields = {"layer_types": ["full_attention"] * 2, **fields}
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, **fields)
    return importlib.import_module(f"models.{model_type}").model_shape(config)


@pytest.mark.parametrize("model_type", QWEN)
def test_sliding_windows(model_type: str) -> None:
    fields = {"sliding_window": 128, "max_window_layers": 1}
    assert _shape(model_type, use_sliding_window=True, **fields).windows == (None, 128)
    assert _shape(model_type, use_sliding_window=False, **fields).windows == ()


@pytest.mark.parametrize("model_type", ["mistral", "phi3"])
def test_without_layer_types_all_layers_have_the_window(model_type: str) -> None:
    shape = _shape(model_type, sliding_window=63)
    assert shape.windows == (63, 63)
    assert (shape.group_windows, shape.layer_groups) == ((63,), (0, 0))
    shape = _shape(model_type, sliding_window=None)
    assert shape.windows == ()
    assert (shape.group_windows, shape.layer_groups) == ((None,), (0, 0))


def test_sliding_layers_of_smollm3() -> None:
    fields = {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]}
    shape = _shape("smollm3", use_sliding_window=True, **fields)
    assert shape.windows == (None, 32)
    assert (shape.group_windows, shape.layer_groups) == ((None, 32), (0, 1))


@pytest.mark.parametrize("model_type", ["llama", "smollm3", "granite"])
def test_biases_of_the_mlp(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="mlp_bias=True"):
        _shape(model_type, mlp_bias=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"use_bidirectional_attention": True, "sliding_window": 8},
        {"layer_types": ["full_attention", "chunked_attention"]},
    ],
    ids=str,
)
def test_what_gemma3_has_and_nobody_built(fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    problem = "chunked_attention" if name == "layer_types" else name
    with pytest.raises(UnsupportedModelError, match=problem):
        _shape("gemma3_text", **fields)


@pytest.mark.parametrize("lost", ["llama_4_scaling_beta", "original_max_position_embeddings"])
def test_ministral3_scales_queries_by_two_parameters(lost: str) -> None:
    parameters = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
    config = SimpleNamespace(rope_parameters=parameters)
    scales = query_scales(config, 40, torch.device("cpu"))
    assert scales[:16].tolist() == [1.0] * 16
    assert scales[33] == pytest.approx(1 + 0.1 * math.log(3))
    del parameters[lost]
    with pytest.raises(UnsupportedModelError, match="must have llama_4_scaling_beta and original"):
        query_scales(config, 40, torch.device("cpu"))


@pytest.mark.parametrize("model_type", ["olmo2", "olmo3"])
def test_norms_over_all_heads_need_one_rank(model_type: str) -> None:
    assert _shape(model_type).qk_norm == "all"
    with pytest.raises(ConfigError, match="tensor_parallel_size=2: is not built for models whose"):
        WholeNormRopeStore(2, 2, 16, 1e-6, place(ParallelContext(0, 2)))


@pytest.mark.parametrize("factor", [0.0, -0.5])
def test_granite_divides_by_its_residual_multiplier(factor: float) -> None:
    with pytest.raises(UnsupportedModelError, match="residual_multiplier"):
        _shape("granite", residual_multiplier=factor)


@pytest.mark.parametrize("factor", [0.0, -2.0])
def test_granite_divides_by_its_logits_scaling(factor: float) -> None:
    with pytest.raises(UnsupportedModelError, match="logits_scaling"):
        _shape("granite", logits_scaling=factor)


def test_granite_divides_the_stream_by_its_residual_multiplier() -> None:
    shape = _shape(
        "granite",
        rms_norm_eps=1e-5,
        embedding_multiplier=12.0,
        residual_multiplier=0.5,
        attention_multiplier=0.125,
        logits_scaling=8.0,
    )
    assert (shape.embedding_scale, shape.rms_norm_eps, shape.logit_scale) == (24.0, 4e-5, 0.125)
    assert shape.attention_scale == 0.125


def test_smollm3_rotates_all_but_every_fourth_layer() -> None:
    config = AutoConfig.for_model("smollm3", num_hidden_layers=6)
    shape = importlib.import_module("models.smollm3").model_shape(config)
    assert shape.ropes == ("", "", "", None, "", "")


def _config(**fields: Any) -> SimpleNamespace:
    """As transformers makes them for other architectures, unchecked."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    others = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    others["max_position_embeddings"] = 8192
    return SimpleNamespace(**{**heads, **sizes, **others, **fields})


def _spec(config: Any) -> DecoderSpec:
    return decoder_spec(config, "layer_types", qkv_bias=False, o_bias=False)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 query heads"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"hidden_size": 60}, "head_dim=15"),
        ({"hidden_size": 3}, "head_dim=0"),
        ({"sliding_window": 0, "layer_types": ["sliding_attention"]}, "sliding_window=0"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window=None"),
        ({"layer_types": ["chunked_attention"]}, "contains chunked_attention"),
        ({"layer_types": ["full_attention"] * 2}, "2 entries for 1 layers"),
    ],
)
def test_sizes_and_windows_of_unchecked_configs(fields: dict[str, Any], problem: str) -> None:
    assert _spec(_config()).head_dim == 16
    _spec(_config(sliding_window=None))
    with pytest.raises(UnsupportedModelError, match=problem):
        _spec(_config(**fields))


def test_windows_are_read_where_the_family_has_them() -> None:
    config = _config(
        num_hidden_layers=2,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
    )
    assert decoder_spec(config).windows == ()
    assert decoder_spec(config, windows="sliding_window").windows == (5, 5)
    assert decoder_spec(config, windows="layer_types").windows == (None, 5)
    del config.layer_types
    assert decoder_spec(config, windows="layer_types").windows == (5, 5)
    with pytest.raises(UnsupportedModelError, match="sliding_window=0"):
        decoder_spec(_config(sliding_window=0), windows="sliding_window")
    # A family without windows ignores what it does not know, as transformers does.
    config = _config(sliding_window=0, layer_types=["chunked_attention"])
    assert decoder_spec(config).windows == ()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_window_in_the_config(model_type: str) -> None:
    """transformers ignores it for some families."""
    ignores = model_type in ("llama", "granite", "olmo2")
    about: dict[str, Any] = {"sliding_window": 5, "use_sliding_window": True}
    about["layer_types"] = ["sliding_attention"] * 2
    if model_type in ("llama", "granite", "olmo2", "mistral", "ministral3", "phi3"):
        del about["layer_types"]
    if model_type in ("qwen2", "qwen3"):
        about["max_window_layers"] = 0
    assert _shape(model_type, **about).windows == (() if ignores else (5, 5))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_attention_to_later_tokens(model_type: str) -> None:
    """transformers reads `is_causal` in the code that all models share."""
    with pytest.raises(UnsupportedModelError, match="is_causal=False"):
        _shape(model_type, is_causal=False)


def test_gemma_ignores_the_activation_of_other_families() -> None:
    assert _shape("gemma3_text", hidden_act="gelu").activation == "gelu_tanh"


def test_smollm3_lists_whether_each_layer_rotates() -> None:
    config = AutoConfig.for_model("smollm3", num_hidden_layers=2)
    make = importlib.import_module("models.smollm3").model_shape
    config.no_rope_layers = [1, 0, 5]
    assert make(config).ropes == ("", None)
    for listed in ([], [1]):
        config.no_rope_layers = listed
        problem = f"no_rope_layers tell the rotation of {len(listed)} layers of 2"
        with pytest.raises(UnsupportedModelError, match=problem):
            make(config)


def test_a_window_that_qwen_switches_off() -> None:
    fields = {"sliding_window": 20, "layer_types": ["sliding_attention"] * 2}
    with pytest.raises(UnsupportedModelError, match="use_sliding_window=False"):
        _shape("qwen2", use_sliding_window=False, **fields)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_other_activations(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="gelu"):
        _shape(model_type, **{_ACTIVATION.get(model_type, "hidden_act"): "gelu"})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_quantised_weights(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="quantis"):
        _shape(model_type, quantization_config={"quant_method": "fp8"})


def test_qwen2_has_biased_projections_and_no_norms_of_heads() -> None:
    shape = _shape("qwen2", hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    assert (shape.qkv_bias, shape.o_bias, shape.qk_norm) == (True, False, "")
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "model_type", ["llama", "smollm3", "granite", "olmo2", "olmo3", "gemma3_text"]
)
def test_biases_of_all_projections_of_attention_are_those_of_the_config(
    model_type: str, bias: bool
) -> None:
    shape = _shape(model_type, attention_bias=bias)
    assert (shape.qkv_bias, shape.o_bias) == (bias, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_qwen3_has_norms_of_heads_and_the_biases_of_its_config(bias: bool) -> None:
    shape = _shape("qwen3", attention_bias=bias, head_dim=32, tie_word_embeddings=bias)
    assert (shape.qkv_bias, shape.o_bias, shape.qk_norm, shape.head_dim) == (
        bias,
        bias,
        "heads",
        32,
    )
    assert shape.tied == bias
