"""The rooflines of workloads on the CUDA devices of this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from benchmarks.collective_cost import all_reduce_seconds
from benchmarks.compare import Contender
from benchmarks.engines import Setting
from benchmarks.roofline import ModelCosts, fastest_seconds, measure_ceilings
from benchmarks.workloads import Workload
from config import Config
from engine.parts import resolve
from utils.checkpoint import open_checkpoint


class Limits:
    """Measures what the machine can do, and says how fast a workload could be.

    Attributes:
        ceilings: the measured limits of the device.
    """

    def __init__(self, setting: Setting) -> None:
        self.ceilings = measure_ceilings(torch.device("cuda"))
        self._setting = setting
        self._checkpoint = open_checkpoint(setting.model)
        self._hf_config: Any = self._checkpoint.hf_config
        dtype: torch.dtype = getattr(torch, setting.dtype)
        self._costs = ModelCosts.of(self._hf_config, dtype.itemsize)
        self._sums: dict[tuple[int, int], float] = {}

    def seconds(self, contender: Contender, work: Workload) -> float:
        """The roofline of a device's share, and every decode step's sums over the ranks."""
        size = int(contender.options.get("tensor_parallel_size", 1))
        shared: dict[str, int] = {name: cost // size for name, cost in asdict(self._costs).items()}
        # Replicated KV heads are not shared.
        shared["kv_bytes"] = self._costs.kv_bytes // min(size, self._hf_config.num_key_value_heads)
        prompts = [len(prompt) for prompt in work.prompts]
        limit = fastest_seconds(ModelCosts(**shared), self.ceilings, prompts, work.lengths)
        if size == 1:
            return limit
        # Two a layer, the embedding's, and the sampled tokens' maximum.
        sums: int = 2 * self._hf_config.num_hidden_layers + 2
        return limit + (max(work.lengths) - 1) * sums * self.sum_seconds(size, len(prompts))

    def sum_seconds(self, size: int, rows: int) -> float:
        """Measured seconds of a sum of hidden states of so many rows over the ranks."""
        if (size, rows) not in self._sums:
            config = resolve(
                Config.from_options(
                    self._setting.model, dtype=self._setting.dtype, tensor_parallel_size=size
                ),
                self._checkpoint,
            )
            self._sums[size, rows] = all_reduce_seconds(config, self._hf_config.hidden_size, rows)
        return self._sums[size, rows]
