"""Triton kernels for the functions of `layers.step_rows`.

A slot is a running request's index in `SlotTables`. In this file a row is one token of a step.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from layers.step_rows import SampledRows, SlotTables, StepRows

_MANY, _FEW = 1024, 16  # 1,024 tokens per program in steps with prefill, 16 or more in other steps
_DRAWN = 32  # number of tokens that each program of `_write_kernel` stores, one per thread


@triton.jit(do_not_specialize=["count"])
def _enter_kernel(
    header_ptr, temperature_ptr, ids_ptr, tables, count, tokens_stride, BLOCK: tl.constexpr
):
    tokens_ptr, temperature_out, seed_out = tables
    request = tl.program_id(0)
    slot = tl.load(header_ptr + request)
    first = tl.load(header_ptr + count + request)
    size = tl.load(header_ptr + 2 * count + request)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + first + at, mask=at < size, other=0)
    tl.store(tokens_ptr + slot * tokens_stride + at, ids, mask=at < size)
    if tl.program_id(1) == 0:
        tl.store(temperature_out + slot, tl.load(temperature_ptr + request))
        for i in tl.static_range(2):
            seed = tl.load(header_ptr + (3 + i) * count + request)
            tl.store(seed_out + 2 * slot + i, seed)


@triton.jit(do_not_specialize=["header_stride"])
def _rows_kernel(
    header_ptr,
    header_stride,
    tables,
    rows,
    sampled,
    padding_slot,
    strides,
    block_size,
    BLOCK: tl.constexpr,
    SAMPLED: tl.constexpr,
):
    tokens_ptr, tables_ptr, computed_ptr, temperature_ptr, seed_ptr = tables
    ids_out, positions_out, mappings_out, slots_out, lens_out, start_out = rows
    drawn_rows_out, drawn_slots_out, next_positions_out, temperature_out, seed_out = sampled
    tokens_stride, tables_stride = strides
    request = tl.program_id(0)
    header = header_ptr + request
    slot = tl.load(header)
    start = tl.load(header + header_stride)
    count = tl.load(header + 2 * header_stride)
    first = tl.load(header + 3 * header_stride)
    place = tl.load(header + 4 * header_stride)
    num_sampled = tl.load(header + 5 * header_stride)
    live = slot != padding_slot
    if start < 0:
        # The request is a decode, and all its tokens belong to program 0, which changes this number
        # below. Other programs may load the old or the new number, but they have no token to write.
        start = tl.load(computed_ptr + slot, mask=live, other=0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    position = tl.where(live, start + at, 0)
    read = mask & live
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=read, other=0)
    entry = slot * tables_stride + position // block_size
    for group in tl.static_range(len(mappings_out)):
        block = tl.load(tables_ptr[group] + entry, mask=read, other=0)
        mapping = block.to(tl.int64) * block_size + position % block_size
        tl.store(mappings_out[group] + first + at, tl.where(live, mapping, -1), mask=mask)
    tl.store(ids_out + first + at, token.to(tl.int64), mask=mask)
    tl.store(positions_out + first + at, position, mask=mask)
    if tl.program_id(1) == 0:
        end = start + count
        tl.store(slots_out + request, slot.to(tl.int32))
        tl.store(lens_out + request, tl.where(live, end, 0).to(tl.int32))
        tl.store(start_out + request, first.to(tl.int32))
        if request == tl.num_programs(0) - 1:
            tl.store(start_out + request + 1, (first + count).to(tl.int32))
        tl.store(computed_ptr + slot, end, mask=live)
        nth = tl.arange(0, SAMPLED)
        there = (place >= 0) & (nth < tl.maximum(num_sampled, 1))
        drawn = there & live & (num_sampled > 0)
        behind = num_sampled - nth
        tl.store(drawn_rows_out + place + nth, tl.where(drawn, first + count - behind, 0), there)
        tl.store(drawn_slots_out + place + nth, tl.where(drawn, slot, padding_slot), there)
        next_position = tl.where(drawn, end - behind + 1, 0)
        tl.store(next_positions_out + place + nth, next_position, there)
        temperature = tl.load(temperature_ptr + slot + 0 * nth, mask=drawn, other=0.0)
        tl.store(temperature_out + place + nth, temperature, there)
        for i in tl.static_range(2):
            seed = tl.load(seed_ptr + 2 * slot + i + 0 * nth, mask=drawn, other=0)
            tl.store(seed_out + 2 * (place + nth) + i, seed, there)


# The four tensors named below may be slices of larger tensors, so they may be unaligned.
@triton.jit(
    do_not_specialize=["size"],
    do_not_specialize_on_alignment=["drawn_ptr", "slots_ptr", "positions_ptr", "drawn_out"],
)
def _write_kernel(
    drawn_ptr,
    slots_ptr,
    positions_ptr,
    tokens_ptr,
    drawn_out,
    size,
    padding_slot,
    tokens_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < size
    slot = tl.load(slots_ptr + row, mask=mask, other=padding_slot)
    live = mask & (slot != padding_slot)
    position = tl.load(positions_ptr + row, mask=live, other=0)
    token = tl.load(drawn_ptr + row, mask=mask, other=0)
    tl.store(drawn_out + row, token, mask=mask)
    known = tl.maximum(token, 0).to(tl.int32)
    tl.store(tokens_ptr + slot * tokens_stride + position, known, mask=live)


def enter_requests(
    tables: SlotTables, header: Tensor, temperatures: Tensor, token_ids: Tensor, longest: int
) -> None:
    count = header.shape[1]
    _enter_kernel[(count, triton.cdiv(longest, _MANY))](
        *(header, temperatures, token_ids, (tables.tokens, tables.temperatures, tables.seeds)),
        *(count, tables.tokens.stride(0), _MANY),
    )


def fill_rows(tables: SlotTables, rows: StepRows) -> None:
    """Do what `layers.step_rows.fill_rows` does. `rows.header[i]` must be contiguous."""
    per_decode, sampled = rows.rows_per_decode, rows.sampled
    block = _MANY if rows.num_chunks else max(_FEW, triton.next_power_of_2(per_decode))
    per_row = rows.input_ids, rows.positions, rows.slot_mapping
    per_request = rows.slots, rows.context_lens, rows.query_start
    drawn = sampled.rows, sampled.slots, sampled.positions, sampled.temperatures, sampled.seeds
    known = tables.tokens, tables.block_tables, tables.num_computed
    _rows_kernel[(rows.header.shape[1], triton.cdiv(max(rows.longest_chunk, 1), block))](
        *(rows.header, rows.header.stride(0), (*known, tables.temperatures, tables.seeds)),
        *((*per_row, *per_request), drawn, tables.padding_slot),
        *((tables.tokens.stride(0), tables.block_tables[0].stride(0)), tables.block_size),
        *(block, triton.next_power_of_2(per_decode)),
        num_warps=1 if block == _FEW else 4,
    )


def write_tokens(tables: SlotTables, sampled: SampledRows, tokens: Tensor) -> None:
    size = tokens.shape[0]
    if size:
        _write_kernel[(triton.cdiv(size, _DRAWN),)](
            *(tokens, sampled.slots, sampled.positions, tables.tokens, sampled.tokens),
            *(size, tables.padding_slot, tables.tokens.stride(0), _DRAWN),
            num_warps=1,
        )
