"""What the runner chooses: architecture, attention backend, graphs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import models.qwen2
import models.qwen3
from config import Config
from engine.model_runner import LocalRunner, find_architecture
from engine.parts import captures_graphs, make_backend, resolve
from engine.types import StepPlan
from layers.attention.base import AttentionSpec
from layers.attention.torch_sdpa import TorchAttention
from layers.parallel import ParallelContext
from tests.checkpoints import Checkpoints
from utils.checkpoint import Checkpoint, open_checkpoint
from utils.errors import ConfigError, EngineClosedError, UnsupportedModelError

SPEC = AttentionSpec(4, 2, 64, 0.125, 16, 128, 4, torch.float32, torch.device("cpu"))


class PickyAttention(TorchAttention):
    """A backend that serves nothing."""

    name = "picky"

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        return f"it dislikes head_dim={spec.head_dim}"


def _config(**options: Any) -> Config:
    return Config(model="x", **{"device": "cpu", "max_num_seqs": 4, **options})


def _checkpoint(model_type: str) -> Checkpoint:
    return Checkpoint(Path("somewhere"), SimpleNamespace(model_type=model_type), frozenset())


@pytest.mark.parametrize(
    ("model_type", "module"), [("qwen2", models.qwen2), ("qwen3", models.qwen3)]
)
def test_an_architecture_is_the_module_of_its_model_type(model_type: str, module: Any) -> None:
    assert find_architecture(_checkpoint(model_type)) is module


@pytest.mark.parametrize("model_type", ["gpt2", "base", "decoder", "", "a.b", "os", "../x", "7b"])
def test_a_model_type_without_a_module_is_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="somewhere is a"):
        find_architecture(_checkpoint(model_type))


def test_auto_takes_a_backend_that_works_here() -> None:
    assert isinstance(make_backend(_config(), SPEC), TorchAttention)


@pytest.mark.parametrize(
    "spec", ["torch", TorchAttention, lambda spec: TorchAttention(spec)], ids=str
)
def test_a_backend_by_name_class_or_factory(spec: Any) -> None:
    assert isinstance(make_backend(_config(attention_backend=spec), SPEC), TorchAttention)


@pytest.mark.parametrize(
    "spec", [PickyAttention, "tests.engine.test_model_runner:PickyAttention"], ids=str
)
def test_a_backend_that_cannot_serve_the_model_says_why(spec: Any) -> None:
    with pytest.raises(ConfigError, match="dislikes head_dim=64") as caught:
        make_backend(_config(attention_backend=spec), SPEC)
    assert caught.value.field == "attention_backend"


def test_what_a_factory_makes_is_checked() -> None:
    for make, problem in (
        (lambda spec: None, "no AttentionBackend"),
        (lambda spec: PickyAttention(spec), "dislikes head_dim=64"),
    ):
        with pytest.raises(ConfigError, match=problem):
            make_backend(_config(attention_backend=make), SPEC)


def test_nothing_is_captured_on_a_cpu() -> None:
    assert not captures_graphs(_config(), TorchAttention(SPEC), torch.float32)


class _FewerBlocks(ParallelContext):
    """One whose peer has room for three blocks."""

    def all_max(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=-3)


def test_the_rank_with_the_fewest_blocks_counts(checkpoints: Checkpoints) -> None:
    """All ranks run the same plans."""
    checkpoint = open_checkpoint(str(checkpoints["qwen2-square"]))
    config = resolve(_config(max_model_len=64, num_kvcache_blocks=8), checkpoint)
    for parallel, count in ((ParallelContext(), 8), (_FewerBlocks(), 3)):
        runner = LocalRunner(config, checkpoint, parallel)
        assert runner.kv_groups[0].num_blocks == count
        runner.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_closed_runner_executes_nothing(checkpoints: Checkpoints, depth: int) -> None:
    checkpoint = open_checkpoint(str(checkpoints["qwen2-square"]))
    runner = LocalRunner(resolve(_config(pipeline_depth=depth), checkpoint), checkpoint)
    assert runner.kv_groups[0].num_blocks > 0
    runner.close()
    runner.close()
    with pytest.raises(EngineClosedError):
        runner.execute(StepPlan(0))
