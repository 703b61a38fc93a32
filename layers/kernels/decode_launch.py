"""Launch configurations and scratch memory of the attention kernel `paged_decode`.

A pair is a request together with one KV head. `paged_decode` cuts the KV tokens of each pair into
tiles, and divides the tiles of all pairs among its programs. Programs that work on the same pair
store partial results. The last to finish combines them. "16/8 heads" means 16 query and 8 KV heads.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class DecodeConfig:
    """Options with which `paged_decode` is compiled and launched."""

    tile: int  # number of KV tokens in a tile; a program reads one tile in each loop iteration
    warps: int
    stages: int
    per_sm: int  # maximum number of programs per multiprocessor, from 1 to MAX_PER_SM
    max_registers: int | None = None
    unroll: int = 4  # number of partial results that are combined in one loop iteration
    pair_cost: int = 0  # time to start work on a pair, in units of the time for one tile


# Times are for one call in a CUDA graph on an H200 with bf16, head_dim 128 and programmatic
# dependent launch. For a request of 400 tokens with 16/8 heads, SMALL takes 4.2 us, LARGE 6.1 us.
SMALL = DecodeConfig(tile=128, warps=8, stages=2, per_sm=1, unroll=8)
# For 24 requests of 1,200 tokens with 12/2 heads (48 pairs), MIDDLE takes 13.7 us, LARGE 15.7 us.
# For 256 requests of 710 tokens with 12/2 heads (512 pairs), MIDDLE takes 53.3 us, LARGE 49.0 us.
MIDDLE = DecodeConfig(tile=64, warps=4, stages=3, per_sm=2, pair_cost=2)
# For 256 requests of 850 tokens LARGE reaches 1.00 times the memory bandwidth of a sum over a large
# tensor with 16/8 heads, and 0.91 times with 12/2 heads. For requests of 100 to 2,000 tokens and
# 16/8 heads it reaches 1.014 times this bandwidth, or 0.970 times if pair_cost is 0.
LARGE = DecodeConfig(tile=32, warps=4, stages=3, per_sm=4, max_registers=128, pair_cost=2)
SMALL_PAIRS = 32  # with 16/8 heads, SMALL is faster than LARGE for 32 pairs, slower for 64 pairs
MIDDLE_PAIRS = 448
MAX_PER_SM = 4


def decode_config(pairs: int) -> DecodeConfig:
    """Return the launch configuration for `pairs` pairs (number of requests times KV heads)."""
    if pairs <= SMALL_PAIRS:
        return SMALL
    return MIDDLE if pairs <= MIDDLE_PAIRS else LARGE


class DecodeWorkspace(NamedTuple):
    """Scratch memory of `paged_decode`; all calls on one CUDA stream can share one workspace."""

    # A program may share its first pair and its last pair with other programs. So each program
    # stores up to two partial results. `rows` is the number of queries of a pair: new tokens times
    # query heads per KV head. `rows` and head_dim are rounded up to powers of two.
    values: Tensor  # float32 [programs, 2, rows, head_dim], attention outputs of partial results
    lse: Tensor  # float32 [programs, 2, rows], base-2 log-sum-exp of the attention scores
    # Program i begins a pair if it computes the pair's first tile. Only the last pair that it
    # begins may continue in other programs. arrived[i] counts this pair's stored partial results.
    arrived: Tensor  # int32 [programs], all 0 between calls of `paged_decode`


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
