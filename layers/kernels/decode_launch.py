"""Launch shapes of `paged_decode`, with what they were measured for, and its scratch memory."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class DecodeConfig:
    """Launch shape of `paged_decode`."""

    tile: int  # tokens
    warps: int
    stages: int
    per_sm: int  # programs per multiprocessor, at most MAX_PER_SM
    max_registers: int | None = None
    unroll: int = 4  # parts that the combination loads at once
    pair_cost: int = 0  # what beginning a (request, KV head) pair costs, in tiles


# One H200, bf16, head_dim 128, in CUDA graphs with dependent launch.  Few pairs: latency.  Context
# 400, 16/8 heads, batch 1: 4.2 us against 6.1 us with LARGE; with tiles of 64 5.2 at batch 2
# against 4.4; with L2 prefetches before the wait, instead of loads, 0.1 to 2.5 us more.
SMALL = DecodeConfig(tile=128, warps=8, stages=2, per_sm=1, unroll=8)
# Between them.  12/2 heads: batch 24 x 1,200 tokens 13.7 us against 15.7 with LARGE, 128 x 900 33.6
# against 42.6, but 256 x 710 53.3 against 49.0.  16/8 heads: 24 x 1,200 35.0 against 37.4.
MIDDLE = DecodeConfig(tile=64, warps=4, stages=3, per_sm=2, pair_cost=2)
# Batch 256, context 850: 1.00 of the rate of a large sum with 16/8 heads, 0.91 with 12/2 (MIDDLE:
# 0.985 and 0.854).  With 16/8 the pair cost takes contexts from 100 to 2000 from 0.970 to 1.014.
LARGE = DecodeConfig(tile=32, warps=4, stages=3, per_sm=4, max_registers=128, pair_cost=2)
# 32 pairs (batch 4, 16/8 heads): 6.7 us with SMALL, 7.3 us with LARGE; 64 pairs: 8.9 and 8.4.
SMALL_PAIRS = 32
MIDDLE_PAIRS = 448
MAX_PER_SM = 4


def decode_config(pairs: int) -> DecodeConfig:
    """The launch shape for so many (request, KV head) pairs."""
    if pairs <= SMALL_PAIRS:
        return SMALL
    return MIDDLE if pairs <= MIDDLE_PAIRS else LARGE


class DecodeWorkspace(NamedTuple):
    """Scratch of `paged_decode`; one serves all batch sizes, and all layers of one stream."""

    values: Tensor  # float32 [programs, 2, rows, head_dim], the last two padded: of shared pairs
    lse: Tensor  # float32 [programs, 2, rows], their log-sum-exp in base 2
    arrived: Tensor  # int32 [programs], zero between calls


def decode_workspace(
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    programs: int = 0,
    rows_per_request: int = 1,
) -> DecodeWorkspace:
    """Scratch for at most so many programs (default: what fills the device) and rows per request.

    1.1 MB for two query heads of 128 per KV head and one row per request.
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
