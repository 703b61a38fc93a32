"""Options as such; what a bad one leads to is in test_bad_inputs.py."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from config import Config
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
    assert getattr(Config.from_options("x", **{name: value}), name) == value


def test_a_budget_of_exactly_one_token_per_request_is_accepted() -> None:
    Config(model="x", max_num_seqs=8, max_num_batched_tokens=8)
    with pytest.raises(ConfigError):
        Config(model="x", max_num_seqs=8, max_num_batched_tokens=7)
