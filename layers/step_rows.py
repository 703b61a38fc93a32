"""The rows of a step as device tensors, made from what the device knows of each request.

The functions here are the reference, in plain torch. `layers.kernels.step_rows` has the same
functions as Triton kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layers.attention.base import AttentionBatch

_PER_ROW = ("input_ids", "positions", "slot_mapping")


@dataclass(frozen=True, slots=True)
class SlotTables:
    """What the device knows of each running request, one row per slot.

    There is one row more than slots. The last row is for padding: it belongs to no request, and
    the kernels neither read nor write it.

    Attributes:
        tokens: [slots + 1, max_model_len] int32 prompt and sampled tokens.
        block_tables: [slots + 1, max_blocks] int32.
        num_computed: [slots + 1] int64 positions computed so far.
        temperatures: [slots + 1] float32.
        seeds: [slots + 1] int64.
        block_size: positions per block.
    """

    tokens: Tensor
    block_tables: Tensor
    num_computed: Tensor
    temperatures: Tensor
    seeds: Tensor
    block_size: int

    @staticmethod
    def zeros(
        num_slots: int, max_model_len: int, block_size: int, device: torch.device
    ) -> SlotTables:
        """Tables of empty slots."""
        rows = num_slots + 1
        blocks = -(-max_model_len // block_size)
        return SlotTables(
            tokens=torch.zeros(rows, max_model_len, dtype=torch.int32, device=device),
            block_tables=torch.zeros(rows, blocks, dtype=torch.int32, device=device),
            num_computed=torch.zeros(rows, dtype=torch.int64, device=device),
            temperatures=torch.zeros(rows, dtype=torch.float32, device=device),
            seeds=torch.zeros(rows, dtype=torch.int64, device=device),
            block_size=block_size,
        )

    @property
    def padding_slot(self) -> int:
        """The row for padding."""
        return self.num_computed.shape[0] - 1


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The R rows of a step whose next token is drawn.

    Attributes:
        rows: [R] int64 rows of the step; 0 for padding.
        slots, positions: [R] int64 where the token goes; the padding slot and 0 for padding.
        temperatures: [R] float32; 0 for padding.
        seeds: [R] int64; 0 for padding.
        tokens: [R] int64 the tokens, as soon as they are drawn.
    """

    rows: Tensor
    slots: Tensor
    positions: Tensor
    temperatures: Tensor
    seeds: Tensor
    tokens: Tensor

    @staticmethod
    def empty(size: int, device: torch.device) -> SampledRows:
        """Unset rows."""
        types = (torch.int64,) * 3 + (torch.float32,) + (torch.int64,) * 2
        return SampledRows(*(torch.empty(size, dtype=t, device=device) for t in types))

    def __getitem__(self, part: slice) -> SampledRows:
        """Views of some of the rows."""
        return SampledRows(*(getattr(self, name)[part] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class StepRows:
    """The T rows of a step: those of its prefill chunks, then those of its decodes.

    A step has B requests, chunks first. Captured steps have fixed addresses and sizes; what a plan
    does not fill is padding.

    Attributes:
        header: [6, B] int64, from which all other tensors are made. For each request its slot, its
            first position (-1: the first one that is not computed), its number of rows, its first
            row, its first place among the R sampled rows (-1: none), and how many of its last rows
            are sampled. With a place and no row that is sampled, the place is padding.
        input_ids, positions, slot_mapping: [T] int64, see `ForwardBatch`; 0, 0 and -1 for padding.
        slots, context_lens: [B] int32; the padding slot and 0 for padding.
        query_start: [B + 1] int32 first row of each request, then T.
        sampled: the rows whose next token is drawn.
        num_chunks: leading requests that are prefill chunks.
        num_chunk_rows: rows of all of them.
        longest_chunk: most rows of one of them.
        rows_per_decode: rows of each decode.
    """

    header: Tensor
    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    slots: Tensor
    context_lens: Tensor
    query_start: Tensor
    sampled: SampledRows
    num_chunks: int
    num_chunk_rows: int
    longest_chunk: int
    rows_per_decode: int

    @staticmethod
    def empty(
        header: Tensor,
        num_rows: int,
        sampled: SampledRows | int,
        *,
        num_chunks: int = 0,
        num_chunk_rows: int = 0,
        longest_chunk: int = 0,
        rows_per_decode: int = 1,
    ) -> StepRows:
        """Unset rows for a header.

        Args:
            sampled: where the sampled rows go, or how many there are.
        """
        device, requests = header.device, header.shape[1]
        if isinstance(sampled, int):
            sampled = SampledRows.empty(sampled, device)
        ids, positions, mapping = torch.empty(3, num_rows, dtype=torch.int64, device=device)
        slots, context_lens = torch.empty(2, requests, dtype=torch.int32, device=device)
        return StepRows(
            header=header,
            input_ids=ids,
            positions=positions,
            slot_mapping=mapping,
            slots=slots,
            context_lens=context_lens,
            query_start=torch.empty(requests + 1, dtype=torch.int32, device=device),
            sampled=sampled,
            num_chunks=num_chunks,
            num_chunk_rows=num_chunk_rows,
            longest_chunk=longest_chunk,
            rows_per_decode=rows_per_decode,
        )

    def first_rows(self, count: int) -> StepRows:
        """The same prefill chunks with views of the first `count` rows."""
        rows = {name: getattr(self, name)[:count] for name in _PER_ROW}
        return replace(self, **rows, num_chunk_rows=count, longest_chunk=count)

    def first_decodes(self, count: int) -> StepRows:
        """Views of the first `count` decodes of rows that have decodes alone."""
        rows = {name: getattr(self, name)[: count * self.rows_per_decode] for name in _PER_ROW}
        requests = {name: getattr(self, name)[:count] for name in ("slots", "context_lens")}
        return replace(
            self,
            header=self.header[:, :count],
            query_start=self.query_start[: count + 1],
            sampled=self.sampled[: count * self.rows_per_decode],
            **rows,
            **requests,
        )

    def attention(self, block_tables: Tensor) -> AttentionBatch:
        """Which request each row belongs to, for an attention backend."""
        return AttentionBatch(
            block_tables=block_tables,
            slots=self.slots,
            context_lens=self.context_lens,
            query_start=self.query_start[: self.num_chunks + 1],
            num_prefills=self.num_chunks,
            num_prefill_tokens=self.num_chunk_rows,
            max_query_len=self.longest_chunk,
            rows_per_decode=self.rows_per_decode,
        )


def enter_requests(
    tables: SlotTables, header: Tensor, temperatures: Tensor, token_ids: Tensor, longest: int
) -> None:
    """Write N new requests into the tables.

    Args:
        header: [4, N] int64: slot, first of its `token_ids`, number of them, seed.
        temperatures: [N] float32.
        token_ids: int32, the requests' tokens end to end.
        longest: most tokens of a request.
    """
    del longest
    slots, _, counts, seeds = header
    tables.temperatures[slots] = temperatures
    tables.seeds[slots] = seeds
    parts = torch.split(token_ids, counts.tolist())
    for slot, ids in zip(slots.tolist(), parts, strict=True):
        tables.tokens[slot, : len(ids)] = ids


def fill_rows(tables: SlotTables, rows: StepRows) -> None:
    """Make all that `rows` has from its header; the rows count as computed from then on.

    Decodes alone of one row each must not have padding, which only captured steps have. They take
    a third of the operations that `fill_any_rows` takes: 0.2 ms less of a CPU's step of 1.3 ms.
    """
    if rows.num_chunks or rows.rows_per_decode != 1:
        fill_any_rows(tables, rows)
        return
    slots, sampled, size = rows.header[0], rows.sampled, tables.block_size
    positions = torch.index_select(tables.num_computed, 0, slots, out=rows.positions)
    context_lens = torch.add(positions, 1, out=sampled.positions)
    tables.num_computed.index_copy_(0, slots, context_lens)
    blocks = tables.block_tables[slots, positions // size].long()
    rows.input_ids.copy_(tables.tokens[slots, positions])
    torch.add(positions % size, blocks, alpha=size, out=rows.slot_mapping)
    rows.slots.copy_(slots)
    rows.context_lens.copy_(context_lens)
    sampled.slots.copy_(slots)
    torch.index_select(tables.temperatures, 0, slots, out=sampled.temperatures)
    torch.index_select(tables.seeds, 0, slots, out=sampled.seeds)
    torch.arange(len(slots), out=sampled.rows)
    torch.arange(len(slots) + 1, out=rows.query_start)


def fill_any_rows(tables: SlotTables, rows: StepRows) -> None:
    """As `fill_rows`, for all kinds of requests and padding."""
    slots, start, counts, first, place, num_sampled = rows.header
    live = slots != tables.padding_slot
    begin = torch.where(start < 0, tables.num_computed[slots], start) * live
    end = begin + counts
    tables.num_computed[slots] = torch.where(live, end, tables.num_computed[slots])
    request = _repeated(counts)
    offset = torch.arange(len(request), device=slots.device) - first[request]
    positions = begin[request] + offset * live[request]
    row_slots, row_live = slots[request], live[request]
    blocks = tables.block_tables[row_slots, positions // tables.block_size].long()
    mapping = blocks * tables.block_size + positions % tables.block_size
    _put(rows.input_ids, tables.tokens[row_slots, positions] * row_live)
    _put(rows.positions, positions)
    _put(rows.slot_mapping, torch.where(row_live, mapping, -1))
    _put(rows.slots, slots)
    _put(rows.context_lens, end * live)
    _put(rows.query_start, torch.cat((first, first[-1:] + counts[-1:])))
    entries = torch.where(place < 0, 0, num_sampled.clamp(min=1))
    owner = _repeated(entries)
    nth = torch.arange(len(owner), device=slots.device) - (entries.cumsum(0) - entries)[owner]
    drawn = (live & (num_sampled > 0))[owner]
    at, behind = place[owner] + nth, (num_sampled[owner] - nth)
    sampled_slots = torch.where(drawn, slots[owner], tables.padding_slot)
    sampled = rows.sampled
    sampled.rows[at] = ((first + counts)[owner] - behind) * drawn
    sampled.slots[at] = sampled_slots
    sampled.positions[at] = (end[owner] - behind + 1) * drawn
    sampled.temperatures[at] = torch.where(drawn, tables.temperatures[sampled_slots], 0.0)
    sampled.seeds[at] = tables.seeds[sampled_slots] * drawn


def write_tokens(tables: SlotTables, sampled: SampledRows, tokens: Tensor) -> None:
    """Store drawn tokens [R] int64 in `sampled`, and where the next step reads them."""
    sampled.tokens.copy_(tokens)
    # The row for padding may be written here; nothing reads it.
    tables.tokens[sampled.slots, sampled.positions] = tokens.to(tables.tokens.dtype)


def _repeated(counts: Tensor) -> Tensor:
    """The index of each entry, as often as its count says."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _put(out: Tensor, values: Tensor) -> None:
    """Values into the first elements of a tensor that may be longer."""
    out[: len(values)] = values
