"""Options as such; what a bad one leads to is in test_bad_inputs.py."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from config import PRESETS, Config
from utils.errors import ConfigError


def test_defaults_are_valid() -> None:
    config = Config(model="somewhere")
    assert config.max_num_batched_tokens >= config.max_num_seqs
    assert config.tensor_parallel_size == 1


def test_a_path_becomes_text() -> None:
    assert Config.from_options(Path("/models/x")).model == "/models/x"


def test_every_option_is_documented() -> None:
    doc = Config.__doc__
    assert doc is not None
    for option in fields(Config):
        assert re.search(rf"^ *(\w+, )*{option.name}(, \w+)*:", doc, re.MULTILINE), option.name


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Config(model="x").seed = 3  # type: ignore[misc]


def test_options_have_names() -> None:
    with pytest.raises(TypeError):
        Config("x")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", 2),
        ("max_num_seqs", 1),
        ("kvcache_block_size", 16),
        ("kvcache_block_size", 48),
        ("num_kvcache_blocks", 1),
        ("kvcache_memory_bytes", 1),
        ("pipeline_depth", 0),
        ("pipeline_depth", 1),
        ("gpu_memory_utilization", 1),
        ("gpu_memory_utilization", 1e-6),
        ("seed", 0),
        ("seed", 2**80),
        ("dtype", "float16"),
        ("enable_prefix_caching", False),
        ("scheduler", object),
        ("scheduler", lambda config, blocks: None),
    ],
)
def test_values_at_the_edge_are_accepted(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    assert getattr(Config.from_options("x", **options), name) == value


def test_a_budget_of_exactly_one_token_per_request_is_accepted() -> None:
    Config(model="x", max_num_seqs=8, max_num_batched_tokens=8)
    with pytest.raises(ConfigError):
        Config(model="x", max_num_seqs=8, max_num_batched_tokens=7)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_set_of_options_that_explicit_ones_override(preset: str) -> None:
    config = Config.from_options("x", preset=preset)
    changed = {f.name for f in fields(Config) if getattr(config, f.name) != f.default} - {"model"}
    assert changed == set(PRESETS[preset])
    assert all(getattr(config, name) == value for name, value in PRESETS[preset].items())
    assert Config.from_options("x", preset=preset, max_num_seqs=7).max_num_seqs == 7


@pytest.mark.parametrize("preset", ["troughput", "", 3, ["throughput"]])
def test_an_unknown_preset_is_refused(preset: Any) -> None:
    with pytest.raises(ConfigError, match="preset=") as caught:
        Config.from_options("x", preset=preset)
    assert caught.value.field == "preset"
    assert "throughput" in caught.value.fix


def test_presets_and_their_values_are_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "presets.md").read_text()
    for preset, options in PRESETS.items():
        assert f"`{preset}`" in page
        for name, value in options.items():
            assert f"`{name}={value!r}`" in page, (preset, name)
