"""The first and the last kernel of a captured decode step: per-slot tables in, tokens out.

A captured step is replayed without the host touching its inputs, so it reads what it needs
from the tables of `engine.batch.SlotTables` by slot, and leaves them ready for its next replay.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

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
