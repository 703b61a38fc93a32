"""Launch configurations of `paged_decode`, with measurements, and its scratch memory.

`paged_decode` divides the KV tokens of all pairs (request, KV head) into tiles, and the tiles among
its programs. "16/8 heads" means 16 query heads and 8 KV heads.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class DecodeConfig:
    """How `paged_decode` is compiled and launched."""

    tile: int  # number of KV tokens that a program reads in one loop iteration
    warps: int
    stages: int
    per_sm: int  # number of programs launched for each multiprocessor, at most MAX_PER_SM
    max_registers: int | None = None
    unroll: int = 4  # number of partial results that `_combine` loads in one loop iteration
    pair_cost: int = 0  # number of tiles added to each pair when work is divided among programs


# Times are of one call on an H200 in a CUDA graph: bf16, head_dim 128, dependent launch. SMALL is
# for few pairs, where latency counts. One request of 400 tokens with 16/8 heads takes 4.2 us
# (LARGE: 6.1). The first K and V tile is loaded before the wait for the previous kernel. With an L2
# prefetch instead, batch 1 takes 0.1 to 1.1 us more, and 1 to 3 us at context 3,800.
SMALL = DecodeConfig(tile=128, warps=8, stages=2, per_sm=1, unroll=8)
# With 12/2 heads, 24 requests of 1,200 tokens (48 pairs) take 13.7 us with MIDDLE and 15.7 us with
# LARGE. 256 requests of 710 tokens (512 pairs) take 53.3 us with MIDDLE and 49.0 us with LARGE.
MIDDLE = DecodeConfig(tile=64, warps=4, stages=3, per_sm=2, pair_cost=2)
# Bandwidths are relative to that of a sum over a large tensor. With 256 requests of 850 tokens
# LARGE reaches 1.00 with 16/8 heads and 0.91 with 12/2 heads (MIDDLE: 0.985 and 0.854). With 16/8
# heads and 100 to 2,000 tokens LARGE reaches 1.014, and 0.970 without pair_cost.
LARGE = DecodeConfig(tile=32, warps=4, stages=3, per_sm=4, max_registers=128, pair_cost=2)
# With 16/8 heads 32 pairs take 6.7 us with SMALL (LARGE: 7.3 us), and 64 take 8.9 us (LARGE: 8.4).
SMALL_PAIRS = 32
MIDDLE_PAIRS = 448
MAX_PER_SM = 4


def decode_config(pairs: int) -> DecodeConfig:
    """The launch configuration for a number of pairs (request, KV head)."""
    if pairs <= SMALL_PAIRS:
        return SMALL
    return MIDDLE if pairs <= MIDDLE_PAIRS else LARGE


class DecodeWorkspace(NamedTuple):
    """Scratch memory of `paged_decode` for all batch sizes and all layers on one CUDA stream."""

    # A program may share its first pair with earlier programs and its last pair with later ones. So
    # it stores up to two results. `rows`, the rows of q for a pair, and head_dim are powers of two.
    values: Tensor  # float32 [programs, 2, rows, head_dim] partial attention outputs
    lse: Tensor  # float32 [programs, 2, rows] base-2 log-sum-exp of the scores of each output
    # For each program, the number of results stored of the last pair that it begins; afterwards 0.
    arrived: Tensor  # int32 [programs]


def decode_workspace(
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    programs: int = 0,
    rows_per_request: int = 1,
) -> DecodeWorkspace:
    """Allocate scratch memory for `programs` programs; 0 means MAX_PER_SM per multiprocessor."""
    if not programs:
        programs = MAX_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    rows = triton.next_power_of_2(rows_per_request * num_heads // num_kv_heads)
    shape = (programs, 2, rows, triton.next_power_of_2(head_dim))
    return DecodeWorkspace(
        values=torch.empty(shape, dtype=torch.float32, device=device),
        lse=torch.empty(shape[:3], dtype=torch.float32, device=device),
        arrived=torch.zeros(programs, dtype=torch.int32, device=device),
    )
