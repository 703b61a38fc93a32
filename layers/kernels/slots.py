"""Between the per-slot tables of `engine.batch.SlotTables` and the rows of a step.

The first and the last kernel of a captured decode step, which is replayed without the host
touching its inputs; and for steps with prefill one kernel each for requests that enter and for
the rows, where torch needs some twenty small operations, 0.5 ms of an H200's host.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One decode step's rows, [B] each.

    Attributes:
        input_ids: int64 token to compute.
        positions: int64 its position.
        slot_mapping: int64 row of the flat KV cache; -1 for padding.
        context_lens: int32 visible tokens, this one included; 0 for padding.
        slots: int32 row of the block tables.
        temperatures: float32.
        seeds: int64.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    context_lens: Tensor
    slots: Tensor
    temperatures: Tensor
    seeds: Tensor

    @staticmethod
    def empty(size: int, device: torch.device) -> DecodeRows:
        """Unset rows for `size` requests."""
        types = (torch.int64,) * 3 + (torch.int32,) * 2 + (torch.float32, torch.int64)
        return DecodeRows(*(torch.zeros(size, dtype=t, device=device) for t in types))

    def first(self, size: int) -> DecodeRows:
        """Views of the first `size` rows."""
        return DecodeRows(*(getattr(self, name)[:size] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class StepRows:
    """Rows of a step with prefill: T tokens of B requests, R of which get a new token.

    Attributes:
        input_ids, positions, slot_mapping: [T] int64; 0, 0 and -1 for padding.
        slots, context_lens: [B] int32; for padding the padding slot and 0.
        query_start: [B + 1] int32 first row of each request, then T.
        sampled_rows, sampled_slots, sampled_positions: [R] int64; 0, the padding slot and 0 for
            padding.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    slots: Tensor
    context_lens: Tensor
    query_start: Tensor
    sampled_rows: Tensor
    sampled_slots: Tensor
    sampled_positions: Tensor

    @staticmethod
    def empty(tokens: int, requests: int, sampled: int, device: torch.device) -> StepRows:
        """Unset rows."""
        long: dict[str, Any] = {"dtype": torch.int64, "device": device}
        int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
        return StepRows(
            *(torch.empty(tokens, **long) for _ in range(3)),
            *(torch.empty(requests + more, **int32) for more in (0, 0, 1)),
            *(torch.empty(sampled, **long) for _ in range(3)),
        )

    def first(self, tokens: int) -> StepRows:
        """The same requests with views of the first `tokens` rows."""
        per_token = {n: getattr(self, n)[:tokens] for n in self.__slots__[:3]}
        return replace(self, **per_token)


@triton.jit(do_not_specialize=["count"])
def _enter_kernel(
    header_ptr,
    temperature_ptr,
    ids_ptr,
    tokens_ptr,
    temperature_out,
    seed_out,
    count,
    tokens_stride,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    slot = tl.load(header_ptr + request)
    first = tl.load(header_ptr + count + request)
    size = tl.load(header_ptr + 2 * count + request)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + first + at, mask=at < size, other=0)
    tl.store(tokens_ptr + slot * tokens_stride + at, ids, mask=at < size)
    if tl.program_id(1) == 0:
        tl.store(temperature_out + slot, tl.load(temperature_ptr + request))
        tl.store(seed_out + slot, tl.load(header_ptr + 3 * count + request))


@triton.jit(do_not_specialize=["requests"])
def _rows_kernel(
    header_ptr,
    tokens_ptr,
    tables_ptr,
    computed_ptr,
    ids_out,
    positions_out,
    mapping_out,
    slots_out,
    lens_out,
    start_out,
    sampled_rows_out,
    sampled_slots_out,
    sampled_positions_out,
    requests,
    padding_slot,
    tokens_stride,
    tables_stride,
    block_size,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    slot = tl.load(header_ptr + request)
    start = tl.load(header_ptr + requests + request)
    count = tl.load(header_ptr + 2 * requests + request)
    first = tl.load(header_ptr + 3 * requests + request)
    sample = tl.load(header_ptr + 4 * requests + request)
    samples = tl.load(header_ptr + 5 * requests + request) != 0
    live = slot != padding_slot
    if start < 0:
        # A decode: one row, whose position the device alone knows.
        start = tl.load(computed_ptr + slot)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    position = tl.where(live, start + at, 0)
    read = mask & live
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=read, other=0)
    block = tl.load(tables_ptr + slot * tables_stride + position // block_size, mask=read, other=0)
    mapping = block.to(tl.int64) * block_size + position % block_size
    tl.store(ids_out + first + at, token.to(tl.int64), mask=mask)
    tl.store(positions_out + first + at, position, mask=mask)
    tl.store(mapping_out + first + at, tl.where(live, mapping, -1), mask=mask)
    if tl.program_id(1) == 0:
        end = start + count
        tl.store(slots_out + request, slot.to(tl.int32))
        tl.store(lens_out + request, tl.where(live, end, 0).to(tl.int32))
        tl.store(start_out + request, first.to(tl.int32))
        tl.store(start_out + request + 1, (first + count).to(tl.int32))
        if live:
            tl.store(computed_ptr + slot, end)
        if sample >= 0:
            tl.store(sampled_rows_out + sample, tl.where(samples, first + count - 1, 0))
            tl.store(sampled_slots_out + sample, tl.where(samples, slot, padding_slot))
            tl.store(sampled_positions_out + sample, tl.where(samples, end, 0))


@triton.jit(do_not_specialize=["size"])
def _gather_kernel(
    slots_ptr,
    tokens_ptr,
    tables_ptr,
    computed_ptr,
    temperature_ptr,
    seed_ptr,
    ids_out,
    positions_out,
    mapping_out,
    lens_out,
    slots_out,
    temperature_out,
    seed_out,
    size,
    padding_slot,
    tokens_stride,
    tables_stride,
    block_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < size
    slot = tl.load(slots_ptr + row, mask=mask, other=padding_slot)
    live = mask & (slot != padding_slot)
    position = tl.load(computed_ptr + slot, mask=live, other=0)
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=live, other=0)
    block = tl.load(tables_ptr + slot * tables_stride + position // block_size, mask=live, other=0)
    mapping = block.to(tl.int64) * block_size + position % block_size
    tl.store(ids_out + row, token.to(tl.int64), mask=mask)
    tl.store(positions_out + row, position, mask=mask)
    tl.store(mapping_out + row, tl.where(live, mapping, -1), mask=mask)
    tl.store(lens_out + row, tl.where(live, position + 1, 0).to(tl.int32), mask=mask)
    tl.store(slots_out + row, slot.to(tl.int32), mask=mask)
    temperature = tl.load(temperature_ptr + slot, mask=live, other=0.0)
    tl.store(temperature_out + row, temperature, mask=mask)
    tl.store(seed_out + row, tl.load(seed_ptr + slot, mask=live, other=0), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _scatter_kernel(
    sampled_ptr,
    slots_ptr,
    positions_ptr,
    tokens_ptr,
    computed_ptr,
    size,
    padding_slot,
    tokens_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < size
    slot = tl.load(slots_ptr + row, mask=mask, other=padding_slot).to(tl.int64)
    live = mask & (slot != padding_slot)
    position = tl.load(positions_ptr + row, mask=live, other=0) + 1
    token = tl.load(sampled_ptr + row, mask=live, other=0).to(tl.int32)
    tl.store(tokens_ptr + slot * tokens_stride + position, token, mask=live)
    tl.store(computed_ptr + slot, position, mask=live)


# Rows of one program: a warp's worth, so that large batches spread over multiprocessors.
_BLOCK = 32


# Tokens of one program of the kernels for prefill.
_TOKENS = 1024


def enter_requests(
    header: Tensor,
    temperatures: Tensor,
    ids: Tensor,
    *,
    longest: int,
    tokens: Tensor,
    out_temperatures: Tensor,
    out_seeds: Tensor,
) -> None:
    """Write new requests into the per-slot tables.

    Args:
        header: [4, N] int64: slot, first of its `ids`, number of them, seed.
        temperatures: [N] float32.
        ids: int32, the requests' tokens end to end.
        longest: greatest number of tokens of a request.
        tokens, out_temperatures, out_seeds: the tables.
    """
    count = header.shape[1]
    _enter_kernel[(count, triton.cdiv(longest, _TOKENS))](
        header,
        temperatures,
        ids,
        tokens,
        out_temperatures,
        out_seeds,
        count,
        tokens.stride(0),
        BLOCK=_TOKENS,
    )


def gather_rows(
    header: Tensor,
    tokens: Tensor,
    block_tables: Tensor,
    num_computed: Tensor,
    *,
    block_size: int,
    longest: int,
    out: StepRows,
) -> None:
    """Fill `out` with the rows of a step and count them as computed.

    Args:
        header: [6, B] int64: slot, first position (-1: the next one of a decode), number of
            rows, first row, place among the sampled ones (-1: none), whether it samples.
        tokens, block_tables, num_computed: the per-slot tables; their last row is padding.
        longest: greatest number of rows of a request.
    """
    requests = header.shape[1]
    _rows_kernel[(requests, triton.cdiv(longest, _TOKENS))](
        header,
        tokens,
        block_tables,
        num_computed,
        *(getattr(out, name) for name in out.__slots__),
        requests,
        num_computed.shape[0] - 1,
        tokens.stride(0),
        block_tables.stride(0),
        block_size,
        BLOCK=_TOKENS,
    )


def gather_decode(
    slots: Tensor,
    tokens: Tensor,
    block_tables: Tensor,
    num_computed: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    *,
    block_size: int,
    out: DecodeRows,
) -> None:
    """Fill `out` with the next position of each of `slots` [B] int64, from the per-slot tables.

    The last row of the tables is padding: it reads nothing and stores nothing.
    """
    size = slots.shape[0]
    _gather_kernel[(triton.cdiv(size, _BLOCK),)](
        slots,
        tokens,
        block_tables,
        num_computed,
        temperatures,
        seeds,
        out.input_ids,
        out.positions,
        out.slot_mapping,
        out.context_lens,
        out.slots,
        out.temperatures,
        out.seeds,
        size,
        num_computed.shape[0] - 1,
        tokens.stride(0),
        block_tables.stride(0),
        block_size,
        BLOCK=_BLOCK,
        num_warps=1,
    )


def gather_decode_reference(
    slots: Tensor,
    tokens: Tensor,
    block_tables: Tensor,
    num_computed: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    *,
    block_size: int,
    out: DecodeRows,
) -> None:
    """Plain torch version of `gather_decode`."""
    live = slots != num_computed.shape[0] - 1
    positions = torch.where(live, num_computed[slots], 0)
    blocks = block_tables[slots, positions // block_size].long()
    out.input_ids.copy_(torch.where(live, tokens[slots, positions], 0))
    out.positions.copy_(positions)
    out.slot_mapping.copy_(torch.where(live, blocks * block_size + positions % block_size, -1))
    out.context_lens.copy_(torch.where(live, positions + 1, 0))
    out.slots.copy_(slots)
    out.temperatures.copy_(torch.where(live, temperatures[slots], 0.0))
    out.seeds.copy_(torch.where(live, seeds[slots], 0))


def scatter_tokens(sampled: Tensor, rows: DecodeRows, tokens: Tensor, num_computed: Tensor) -> None:
    """Store sampled tokens [B] behind the rows they came from; the rows count as computed."""
    size = sampled.shape[0]
    _scatter_kernel[(triton.cdiv(size, _BLOCK),)](
        sampled,
        rows.slots,
        rows.positions,
        tokens,
        num_computed,
        size,
        num_computed.shape[0] - 1,
        tokens.stride(0),
        BLOCK=_BLOCK,
        num_warps=1,
    )


def scatter_tokens_reference(
    sampled: Tensor, rows: DecodeRows, tokens: Tensor, num_computed: Tensor
) -> None:
    """Plain torch version of `scatter_tokens`."""
    live = rows.slots != num_computed.shape[0] - 1
    slots, positions = rows.slots[live].long(), rows.positions[live] + 1
    tokens[slots, positions] = sampled[live].to(tokens.dtype)
    num_computed[slots] = positions
