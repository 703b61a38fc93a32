"""Launch shapes of `paged_decode`, with the measurements behind them, and its scratch memory.

A pair is a request and a KV head. "16/8 heads" means 16 query heads and 8 KV heads.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class DecodeConfig:
    """Launch shape of `paged_decode`."""

    tile: int  # KV tokens that a program reads at once
    warps: int
    stages: int
    per_sm: int  # programs per multiprocessor, at most MAX_PER_SM
    max_registers: int | None = None
    unroll: int = 4  # partial results that `_combine` loads at once
    pair_cost: int = 0  # cost of beginning a pair, in tiles, when work is divided


# Times are of one call on an H200, bf16, head_dim 128, in CUDA graphs with dependent launch. SMALL
# is for few pairs, where latency counts. With context 400 and 16/8 heads, batch 1 takes 4.2 us
# (LARGE: 6.1). Batch 2 takes 4.4 us, and 5.2 us with tiles of 64 tokens. Prefetching K and V to L2
# before the wait for the previous kernel, instead of loading them, takes 0.1 to 2.5 us more.
SMALL = DecodeConfig(tile=128, warps=8, stages=2, per_sm=1, unroll=8)
# MIDDLE is between SMALL and LARGE. With 12/2 heads 24 requests of 1,200 tokens take 13.7 us
# (LARGE: 15.7), 128 requests of 900 take 33.6 us (LARGE: 42.6), but 256 requests of 710 take
# 53.3 us (LARGE: 49.0). With 16/8 heads 24 requests of 1,200 tokens take 35.0 us (LARGE: 37.4).
MIDDLE = DecodeConfig(tile=64, warps=4, stages=3, per_sm=2, pair_cost=2)
# At batch 256 and context 850 LARGE reads memory 1.00 times as fast as a sum over a large tensor
# with 16/8 heads, and 0.91 times as fast with 12/2 heads. MIDDLE reads 0.985 and 0.854 times as
# fast. With contexts of 100 to 2,000 tokens and 16/8 heads pair_cost raises LARGE's 0.970 to 1.014.
LARGE = DecodeConfig(tile=32, warps=4, stages=3, per_sm=4, max_registers=128, pair_cost=2)
# With SMALL and 16/8 heads 32 pairs take 6.7 us (LARGE: 7.3), and 64 take 8.9 us (LARGE: 8.4).
SMALL_PAIRS = 32
MIDDLE_PAIRS = 448
MAX_PER_SM = 4


def decode_config(pairs: int) -> DecodeConfig:
    """The launch shape for a number of (request, KV head) pairs."""
    if pairs <= SMALL_PAIRS:
        return SMALL
    return MIDDLE if pairs <= MIDDLE_PAIRS else LARGE


class DecodeWorkspace(NamedTuple):
    """Scratch of `paged_decode`, shared by all batch sizes and by all layers on one CUDA stream."""

    # A program stores up to two partial results: of the pair that it shares with earlier programs,
    # and of the pair that it shares with later programs. rows and head_dim are powers of two.
    values: Tensor  # float32 [programs, 2, rows, head_dim] partial results
    lse: Tensor  # float32 [programs, 2, rows] log-sum-exp of their scores, in base 2
    arrived: Tensor  # int32 [programs], stored results of the pair each begins; 0 between calls


def decode_workspace(
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    programs: int = 0,
    rows_per_request: int = 1,
) -> DecodeWorkspace:
    """Allocate scratch for `programs` programs; by default the number that fills the device."""
    # On an H200 the default takes 1.1 MB for 2 query heads of 128 per KV head, 1 row per request.
    if not programs:
        programs = MAX_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    rows = triton.next_power_of_2(rows_per_request * num_heads // num_kv_heads)
    shape = (programs, 2, rows, triton.next_power_of_2(head_dim))
    return DecodeWorkspace(
        values=torch.empty(shape, dtype=torch.float32, device=device),
        lse=torch.empty(shape[:3], dtype=torch.float32, device=device),
        arrived=torch.zeros(programs, dtype=torch.int32, device=device),
    )
