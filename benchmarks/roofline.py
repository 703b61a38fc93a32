"""What a machine can do, and how fast a workload could be on it at best."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured limits of a device: bytes read per second, and bf16 matmul FLOP per second."""

    read_bandwidth: float
    matmul_rate: float


def median_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median device time of `run` on the current CUDA stream, after three warm-ups."""
    times: list[float] = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Read bandwidth by the sum of 8 GiB in bf16, matmul rate by 8192^3 products of random data."""
    big = torch.empty(2**32, dtype=torch.bfloat16, device=device).normal_()
    bandwidth = big.nbytes / median_seconds(big.sum)
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device)
    rate = 2 * 8192**3 / median_seconds(lambda: torch.mm(a, b))
    del big
    torch.cuda.empty_cache()
    return Ceilings(bandwidth, rate)


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """What a decoder costs to run, from its config.

    Attributes:
        weight_bytes: read by every step: all matrices but an embedding that is not the head.
        flops_per_token: of the matrices of the layers, without the head.
        head_flops: of the output head, per sampled token.
        attention_flops: per query token and visible token.
        kv_bytes: of one token, all layers.
    """

    weight_bytes: int
    flops_per_token: int
    head_flops: int
    attention_flops: int
    kv_bytes: int

    @staticmethod
    def of(hf_config: Any, dtype_bytes: int) -> ModelCosts:
        """The costs of a Qwen-like decoder."""
        c = hf_config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        q, kv = c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim
        layer = c.hidden_size * (2 * q + 2 * kv) + 3 * c.hidden_size * c.intermediate_size
        layers, head = c.num_hidden_layers * layer, c.vocab_size * c.hidden_size
        return ModelCosts(
            weight_bytes=(layers + head) * dtype_bytes,
            flops_per_token=2 * layers,
            head_flops=2 * head,
            attention_flops=4 * q * c.num_hidden_layers,
            kv_bytes=2 * kv * c.num_hidden_layers * dtype_bytes,
        )


def fastest_seconds(
    costs: ModelCosts, ceilings: Ceilings, prompts: list[int], outputs: list[int]
) -> float:
    """Least time to serve requests that all run at once.

    (KV bytes read + weight bytes per step) / read bandwidth + prefill FLOPs / matmul rate.
    A request's first token comes out of its prefill, each later one reads the KV of all before.

    Args:
        prompts, outputs: tokens of each request.
    """
    kv_tokens = sum((n - 1) * p + n * (n - 1) // 2 for p, n in zip(prompts, outputs, strict=True))
    num_bytes = kv_tokens * costs.kv_bytes + (max(outputs) - 1) * costs.weight_bytes
    flops = sum(
        p * costs.flops_per_token + costs.head_flops + p * p // 2 * costs.attention_flops
        for p in prompts
    )
    return num_bytes / ceilings.read_bandwidth + flops / ceilings.matmul_rate
