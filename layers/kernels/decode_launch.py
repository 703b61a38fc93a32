"""Launch configurations and scratch memory of the attention kernel `paged_decode`.

A pair is a request together with one KV head. `paged_decode` cuts the keys of each pair into splits
of SPLIT keys, and divides the splits of all pairs among its programs. If several programs work on a
pair, they store the results of splits, and the last of these programs to finish folds them in the
order of the splits. "16/8 heads" means 16 query and 8 KV heads. No configuration changes a bit of
the output.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from layers.kernels.attention_parts import SPLIT


@dataclass(frozen=True)
class DecodeConfig:
    """Options with which `paged_decode` is compiled and launched."""

    block: int  # number of keys that are loaded at once, a divisor of SPLIT
    warps: int
    stages: int
    per_sm: int  # maximum number of programs per multiprocessor, from 1 to MAX_PER_SM
    max_registers: int | None = None
    unroll: int = 4  # number of splits' results that are loaded in one iteration of the last fold
    pair_cost: int = 0  # time to start work on a pair, in units of the time for UNIT keys


SMALL = DecodeConfig(block=128, warps=8, stages=2, per_sm=1, unroll=16)
LARGE = DecodeConfig(block=128, warps=4, stages=2, per_sm=2, pair_cost=2)
SMALL_PAIRS = 32
MAX_PER_SM = 4
UNIT = 32  # number of keys by which a pair's share of the work is counted
# 16/8 heads, 528 programs and contexts of up to 4,096 tokens need 18 MB, 12/2 heads need 72 MB.
MOST_BYTES = 128 << 20


def decode_config(pairs: int) -> DecodeConfig:
    """Return the launch configuration for `pairs` pairs (number of requests times KV heads)."""
    return SMALL if pairs <= SMALL_PAIRS else LARGE


class DecodeWorkspace(NamedTuple):
    """Scratch memory of `paged_decode`; all calls on one CUDA stream can share one workspace."""

    # The first `programs` slots are for totals: a program stores the total of the first splits of
    # the last pair that it begins. The other slots are for the splits that other programs compute
    # of such a pair. `rows` is the number of queries of a pair: new tokens times query heads per KV
    # head. `rows` and head_dim are rounded up to powers of two.
    values: Tensor  # float32 [slots, rows, head_dim], sums of weighted values
    norm: Tensor  # float32 [slots, rows], sums of weights
    top: Tensor  # float32 [slots, rows], highest scores
    # Program i begins a pair if the pair's first unit of work is its own. Only the last pair that
    # it begins may continue in other programs. arrived[i] counts the programs that have stored
    # their results for this pair.
    arrived: Tensor  # int32 [programs], all 0 between calls of `paged_decode`


def decode_workspace(
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_context_len: int,
    programs: int = 0,
    rows_per_request: int = 1,
) -> DecodeWorkspace:
    """Allocate scratch memory for `programs` programs; 0 means MAX_PER_SM per multiprocessor.

    Each program may begin one pair of `max_context_len` tokens that other programs continue. If the
    slots for all splits of such pairs take more than MOST_BYTES, there are fewer slots. That is no
    error: where the splits of a batch might not fit, the kernel leaves each pair to one program.
    """
    if not programs:
        programs = MAX_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    rows = triton.next_power_of_2(rows_per_request * num_heads // num_kv_heads)
    columns = triton.next_power_of_2(head_dim)
    slots = programs * (1 + triton.cdiv(max_context_len, SPLIT))
    slots = max(programs, min(slots, MOST_BYTES // (4 * rows * (columns + 2))))
    shape = (slots, rows, columns)
    return DecodeWorkspace(
        values=torch.empty(shape, dtype=torch.float32, device=device),
        norm=torch.empty(shape[:2], dtype=torch.float32, device=device),
        top=torch.empty(shape[:2], dtype=torch.float32, device=device),
        arrived=torch.zeros(programs, dtype=torch.int32, device=device),
    )
