"""Launch shapes of `paged_decode`, with what they were measured for, and its scratch memory."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class DecodeConfig:
    """Launch shape of `paged_decode`.

    tile: tokens per tile.
    warps, stages, max_registers: compiler options.
    per_sm: programs per multiprocessor, at most 4.
    unroll: parts that the combination loads at once.
    pair_cost: what beginning a (request, KV head) pair costs, in tiles, where programs take
        several pairs.
    """

    tile: int
    warps: int
    stages: int
    per_sm: int
    max_registers: int | None = None
    unroll: int = 4
    pair_cost: int = 0


# One H200, bf16, head_dim 128, in CUDA graphs with `early_reads`.  Few pairs: latency.  Context
# 400, 16/8 heads, batch 1: 4.2 us against 6.1 us with LARGE; 12/2 heads, batch 8: 5.1 against 9.8.
# Tiles of 64 were level at batch 1 and slower from batch 2 on (5.2 us against 4.4 us); L2
# prefetches before the wait, instead of loads, cost 0.1 to 2.5 us.
SMALL = DecodeConfig(tile=128, warps=8, stages=2, per_sm=1, unroll=8)
# Between them.  12/2 heads: batch 24 x 1,200 tokens 13.7 us against 15.7 with LARGE, 128 x 900 33.6
# against 42.6, 192 mixed from 300 to 1,700 53.3 against 54.9, but 256 x 710 53.3 against 49.0.
# 16/8 heads: 24 x 1,200 35.0 against 37.4, 64 x 1,000 66.2 against 67.5, level beyond.
MIDDLE = DecodeConfig(tile=64, warps=4, stages=3, per_sm=2, pair_cost=2)
# Batch 256, context 850: 1.00 of the rate of a large sum with 16/8 heads, 0.91 with 12/2.  Tiles
# of 64 with 2 programs per multiprocessor: 0.985 and 0.854.  The pair cost takes contexts mixed
# from 100 to 2000 from 0.970 to 1.014 (16/8) and from 0.836 to 0.860 (12/2).
LARGE = DecodeConfig(tile=32, warps=4, stages=3, per_sm=4, max_registers=128, pair_cost=2)
# 32 pairs (batch 4, 16/8 heads): 6.7 us against 7.3 us with LARGE; 64 pairs: 8.9 against 8.4.
SMALL_PAIRS = 32
MIDDLE_PAIRS = 448
MAX_PER_SM = 4


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of `paged_decode`; one serves all batch sizes, and all layers of one stream.

    values: float32 [programs, 2, rows, head_dim] (both padded to powers of two), results of the
        parts of shared pairs.
    lse: float32 [programs, 2, rows], their log-sum-exp in base 2.
    arrived: int32 [programs], zero between calls.
    """

    values: Tensor
    lse: Tensor
    arrived: Tensor


def decode_workspace(
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    programs: int = 0,
    rows_per_request: int = 1,
) -> DecodeWorkspace:
    """Allocate the scratch for at most `programs` programs (default: what fills the device).

    `rows_per_request` is the largest one of the calls.  The size depends neither on the batch nor
    on the context length: 1.1 MB for two query heads of 128 per KV head and one row per request.
    """
    if not programs:
        programs = MAX_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    rows = triton.next_power_of_2(rows_per_request * num_heads // num_kv_heads)
    shape = (programs, 2, rows, triton.next_power_of_2(head_dim))
    return DecodeWorkspace(
        values=torch.empty(shape, dtype=torch.float32, device=device),
        lse=torch.empty(shape[:3], dtype=torch.float32, device=device),
        arrived=torch.zeros(programs, dtype=torch.int32, device=device),
    )


def decode_config(pairs: int) -> DecodeConfig:
    """The launch shape for so many (request, KV head) pairs."""
    if pairs <= SMALL_PAIRS:
        return SMALL
    return MIDDLE if pairs <= MIDDLE_PAIRS else LARGE
