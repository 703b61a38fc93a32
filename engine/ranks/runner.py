"""A runner whose model is divided over several processes, one per device."""

from __future__ import annotations

from dataclasses import replace

import torch

from config import Config
from engine.model_runner import LocalRunner, find_architecture
from engine.ranks.collectives import join_ranks
from engine.ranks.processes import RankProcesses
from engine.ranks.worker import MakeRunner, Rank
from engine.types import ModelRunner
from layers.parallel import ParallelContext
from utils.checkpoint import Checkpoint
from utils.errors import ConfigError


def local_rank(
    config: Config, checkpoint: Checkpoint, rank: Rank, *, peer: bool = True
) -> ModelRunner:
    """The runner of one rank, in a process of its own: a `LocalRunner` that has joined the others.

    Args:
        peer: see `join_ranks`.
    """
    context = join_ranks(config, rank, int(checkpoint.hf_config.hidden_size), peer=peer)
    if config.device == "cpu":
        # The parent runs ahead already; a thread here would only add its own overhead.
        config = replace(config, pipeline_depth=0)
    return LocalRunner(config, checkpoint, context)


class TensorParallelRunner(RankProcesses):
    """Sends every plan to the ranks, each of which runs it on its share of the model.

    The process that schedules runs no model: a rank that fails takes nothing of the caller's
    with it, and planning overlaps with what the ranks do on the host.

    Args:
        config: resolved; tensor_parallel_size says how many ranks.
        make_runner: what makes a rank's runner in its process.

    Raises:
        ConfigError: the model's heads do not divide by the ranks, or there are too few devices.
        Exception: see `RankProcesses`.
    """

    name = "tensor_parallel"

    def __init__(
        self, config: Config, checkpoint: Checkpoint, make_runner: MakeRunner = local_rank
    ) -> None:
        if getattr(make_runner, "func", make_runner) is local_rank:
            _check_divides(config, checkpoint)
        num_threads = max(1, torch.get_num_threads() // config.tensor_parallel_size)
        super().__init__(config, checkpoint, make_runner, num_threads)


def _check_divides(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse what cannot work before any process is started."""
    size = config.tensor_parallel_size
    if config.device == "cuda" and size > (count := torch.cuda.device_count()):
        raise ConfigError(
            "tensor_parallel_size", size, f"there are {count} CUDA devices", f"Use {count} or less."
        )
    shape = find_architecture(checkpoint).model_shape(checkpoint.hf_config)
    any_rank = ParallelContext(0, size)
    any_rank.per_rank("query heads", shape.num_heads)
    any_rank.kv_heads(shape.num_kv_heads)
