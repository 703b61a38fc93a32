"""Launches the kernel of hopper_decode.py."""

import math
from dataclasses import dataclass

import triton
from torch import Tensor

from layers.kernels.attention_parts import LOG2_E, SPLIT
from layers.kernels.decode_launch import MAX_PER_SM, UNIT, DecodeWorkspace
from layers.kernels.hopper_decode import hopper_decode_kernel
from layers.kernels.prefill_launch import fits_hopper
from layers.kernels.tma import descriptor
from memory.kv_cache import KVLayer

MOST_PROGRAMS = 32  # paged_decode.MOST_PROGRAMS


@dataclass(frozen=True)
class HopperDecodeConfig:
    """Options with which `hopper_decode` is compiled and launched."""

    stages: int  # tiles of 32 KiB in the ring, at least 2
    per_sm: int  # maximum number of programs per multiprocessor, from 1 to MAX_PER_SM
    pair_cost: int = 0  # time to start work on a pair, in units of the time for UNIT keys
    least: int = 1  # splits of a program that works on one pair only, as far as the pair has them
    unroll: int = 4  # number of splits' results that are loaded in one iteration of the last fold
    registers: int = 64  # of a thread of the producer


# On an H200 these took at most 6 % longer than the fastest of 4 to 10 configurations, for 1 to 256
# requests with 400 to 4,000 tokens of 16/8 and 12/2 heads, and for 1 and 8 requests of 32/8 heads.
# MIDDLE is for fewer pairs than multiprocessors. It was timed with 12/2 heads only.
FEW = HopperDecodeConfig(stages=3, per_sm=1, unroll=8)
MIDDLE = HopperDecodeConfig(stages=6, per_sm=1, pair_cost=1)
MANY = HopperDecodeConfig(stages=3, per_sm=2, pair_cost=1)


def fits_hopper_decode(q: Tensor, kv: KVLayer, rows_per_request: int) -> bool:
    """Whether `hopper_decode` can compute this, on a GPU of compute capability 9.0."""
    return rows_per_request == 1 and q.shape[1] // kv.k.shape[2] <= 16 and fits_hopper(q, kv)


def hopper_decode(
    q: Tensor,
    kv: KVLayer,
    block_tables: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    scale: float,
    max_context_len: int,
    out: Tensor,
    workspace: DecodeWorkspace,
    pdl: bool,
    window: int | None = None,
    config: HopperDecodeConfig | None = None,
) -> Tensor:
    """Compute what `paged_decode` does, where `fits_hopper_decode` allows it."""
    (batch, num_heads, dim), (_, page, kv_heads, _) = q.shape, kv.k.shape
    group, pairs = num_heads // kv_heads, batch * kv_heads
    most = triton.cdiv(max_context_len, SPLIT)
    if config is None:
        processors = workspace.arrived.numel() // MAX_PER_SM
        config = FEW if 2 * pairs <= processors else MIDDLE if pairs <= processors else MANY
    programs = max(1, workspace.arrived.numel() * config.per_sm // MAX_PER_SM)
    apart = 2 * pairs <= programs  # whether to limit each program to one pair
    limit = min(MOST_PROGRAMS, triton.cdiv(most, config.least))
    programs = min(programs, pairs * (limit if apart else most + 1))
    # One descriptor serves K and V: a row has all heads of K, then all heads of V.
    rows = kv.flat.view(kv.flat.shape[0], -1)
    batch_pad = 32 if batch <= 32 else max(256, triton.next_power_of_2(batch))  # few variants
    # Values of a part that a thread loads, of which all in an iteration are in registers at once.
    loaded = max(1, triton.next_power_of_2(group) * dim // 128)
    hopper_decode_kernel[(programs,)](
        q,
        descriptor(rows, math.gcd(page, SPLIT), 64),
        descriptor(rows, 16, 64),
        *(block_tables, slots, context_lens, out, tuple(workspace)),
        *(scale * LOG2_E, batch, 0 if apart else config.pair_cost),
        *(limit, config.least, workspace.values.shape[0]),
        *(block_tables.stride(0), (*q.stride()[:2], *out.stride()[:2])),
        *(kv_heads, group, dim, page, config.stages * 128 // dim, SPLIT if apart else UNIT),
        *(batch_pad, max(1, min(config.unroll, 24 // loaded)), pdl, apart, config.registers),
        window or 0,
        num_warps=4,
        # 8 warps are allocated, as registers are given to groups of four.
        maxnreg=128,  # for two programs, whose threads share the registers unequally
        launch_pdl=pdl,
    )
    return out
