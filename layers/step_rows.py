"""Device tensors that describe the tokens of a step, filled from device tables of all requests.

A row of a step is one token in this file, not all work of a step for one request as in
`engine.types`. A CUDA graph computes a fixed number of requests and rows. If a step has fewer,
padding requests and padding rows fill it up. Their slot is the last, `SlotTables.padding_slot`.
`KVLayer.flat` has one row for each position of each KV cache block. On CUDA, Triton kernels in
`layers.kernels.step_rows` replace `enter_requests`, `fill_rows` and `write_tokens`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layers.attention.base import AttentionBatch


@dataclass(frozen=True, slots=True)
class SlotTables:
    """Device tables of all running requests. A slot is the index of a request's row in the tables.

    Attributes:
        tokens: token ids of each request's prompt and output, int32 [slots + 1, max_model_len].
        block_tables: for each cache group the ids of each request's KV cache blocks, int32
            [slots + 1, max_blocks].
        num_computed: how many tokens of each request have K and V in the cache, int64 [slots + 1].
        temperatures: sampling temperature of each request, float32 [slots + 1].
        seeds: seed of each request, and sample + 2^32 * kind of the seed, int64 [slots + 1, 2].
    """

    tokens: Tensor
    block_tables: tuple[Tensor, ...]
    num_computed: Tensor
    temperatures: Tensor
    seeds: Tensor
    block_size: int

    @staticmethod
    def zeros(
        num_slots: int, max_model_len: int, block_size: int, device: torch.device, groups: int = 1
    ) -> SlotTables:
        zeros = functools.partial(torch.zeros, device=device)
        rows, blocks = num_slots + 1, -(-max_model_len // block_size)
        tokens = zeros(rows, max_model_len, dtype=torch.int32)
        tables = tuple(zeros(rows, blocks, dtype=torch.int32) for _ in range(groups))
        computed, seeds = zeros(rows, dtype=torch.int64), zeros(rows, 2, dtype=torch.int64)
        temperatures = zeros(rows, dtype=torch.float32)
        return SlotTables(tokens, tables, computed, temperatures, seeds, block_size)

    @property
    def padding_slot(self) -> int:
        return self.num_computed.shape[0] - 1


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The R sampled rows of a step: the rows for which a next token is sampled.

    Sampled row i is row `rows[i]` of the step, and belongs to the request in slot `slots[i]`. The
    sampled token, `tokens[i]`, has position `positions[i]` in this request. If sampled row i is
    padding, `slots[i]` is the padding slot, and `rows[i]`, `positions[i]`, `temperatures[i]` and
    `seeds[i]` are 0. The tensors are int64 [R], except `temperatures`, which is float32 [R], and
    `seeds`, which is int64 [R, 2] with the columns of `SlotTables.seeds`.
    """

    rows: Tensor
    slots: Tensor
    positions: Tensor
    temperatures: Tensor
    seeds: Tensor
    tokens: Tensor

    @staticmethod
    def empty(size: int, device: torch.device) -> SampledRows:
        rows, slots, positions, tokens = torch.empty(4, size, dtype=torch.int64, device=device)
        temperatures = torch.empty(size, dtype=torch.float32, device=device)
        seeds = torch.empty(size, 2, dtype=torch.int64, device=device)
        return SampledRows(rows, slots, positions, temperatures, seeds, tokens)

    def __getitem__(self, part: slice | Tensor) -> SampledRows:
        return SampledRows(*(getattr(self, name)[part] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class StepRows:
    """The T rows (tokens) of a step of B requests: rows of prefill chunks first, then of decodes.

    Attributes:
        header: int64 [6, B], one column for each request. `fill_rows` computes all other tensors
            from `header`. Element 0 of a column is the request's slot. Element 1 is the position of
            the request's first row, or -1 to read this position from `SlotTables.num_computed`.
            Element 2 is the request's number of rows. Element 3 is the index of the first of these
            rows in the step. Element 5 is the number of sampled rows, which are the request's last
            rows. Element 4 is the first sampled row's index in `sampled`, or -1 to store no rows in
            `sampled`. If element 5 is 0 and element 4 is not -1, one padding row is stored there.
        input_ids, positions: token id and position of each row, int64 [T]; 0 for padding rows.
        slot_mapping: for each cache group the index in `KVLayer.flat` of each row's K and V, int64
            [T]; -1 for padding rows.
        slots: slot of each request, int32 [B]; the padding slot for a padding request.
        context_lens: each request's number of tokens up to its last row, int32 [B]; 0 for padding.
        query_start: index of each request's first row, int32 [B + 1]; the last element is T.
        num_chunks, num_chunk_rows: number of prefill chunks, and of all rows before the decodes.
        longest_chunk: upper bound of a chunk's number of rows; 0 if there are no chunks.
        rows_per_decode: number of rows of each decode; above 1 only with speculative decoding.
    """

    header: Tensor
    input_ids: Tensor
    positions: Tensor
    slot_mapping: tuple[Tensor, ...]
    slots: Tensor
    context_lens: Tensor
    query_start: Tensor
    sampled: SampledRows
    num_chunks: int = 0
    num_chunk_rows: int = 0
    longest_chunk: int = 0
    rows_per_decode: int = 1

    @staticmethod
    def empty(
        header: Tensor, num_rows: int, sampled: SampledRows | int, groups: int = 1, **counts: int
    ) -> StepRows:
        """Allocate all tensors but `header`. `sampled`: the sampled rows, or only their number."""
        device, requests = header.device, header.shape[1]
        if isinstance(sampled, int):
            sampled = SampledRows.empty(sampled, device)
        per_row = torch.empty(2 + groups, num_rows, dtype=torch.int64, device=device)
        ids, positions, *mappings = per_row
        slots, lens = torch.empty(2, requests, dtype=torch.int32, device=device)
        start = torch.empty(requests + 1, dtype=torch.int32, device=device)
        mapping = tuple(mappings)
        return StepRows(header, ids, positions, mapping, slots, lens, start, sampled, **counts)

    def first_rows(self, count: int) -> StepRows:
        """Return a view of all requests and the first `count` rows of a step without decodes."""
        return replace(
            self,
            input_ids=self.input_ids[:count],
            positions=self.positions[:count],
            slot_mapping=tuple(mapping[:count] for mapping in self.slot_mapping),
            num_chunk_rows=count,
            longest_chunk=count,
        )

    def first_decodes(self, count: int) -> StepRows:
        """Return a view of the first `count` decodes. The step must have no prefill chunks."""
        rows = count * self.rows_per_decode
        return replace(
            self.first_rows(rows),
            num_chunk_rows=0,
            longest_chunk=0,
            header=self.header[:, :count],
            slots=self.slots[:count],
            context_lens=self.context_lens[:count],
            query_start=self.query_start[: count + 1],
            sampled=self.sampled[:rows],
        )

    def attention(self, block_tables: Tensor, window: int | None = None) -> AttentionBatch:
        """Return the `AttentionBatch` of a cache group. Its prefills are the prefill chunks."""
        start = self.query_start[: self.num_chunks + 1]
        counts = self.num_chunks, self.num_chunk_rows, self.longest_chunk, self.rows_per_decode
        # A CUDA graph of prefill chunks has an extra request for padding rows. Leave it out here.
        decodes = (len(self.input_ids) - self.num_chunk_rows) // self.rows_per_decode
        slots, lens = (x[: self.num_chunks + decodes] for x in (self.slots, self.context_lens))
        return AttentionBatch(block_tables, slots, lens, start, *counts, window)


def enter_requests(
    tables: SlotTables, header: Tensor, temperatures: Tensor, token_ids: Tensor, longest: int
) -> None:
    """Write the token ids, temperatures (float32 [N]) and seeds of N requests into the tables.

    `token_ids` (int32) has the ids of all requests, one request after another. `header` is int64
    [5, N], one column for each request. Element 0 of a column is the request's slot. Element 1 is
    the index of the request's first id in `token_ids`. Element 2 is the request's number of ids, at
    most `longest`. Elements 3 and 4 are the request's row of `tables.seeds`.
    """
    del longest
    slots, _, counts, *_ = header
    tables.temperatures[slots] = temperatures
    tables.seeds[slots] = header[3:].T
    parts = torch.split(token_ids, counts.tolist())
    for slot, ids in zip(slots.tolist(), parts, strict=True):
        tables.tokens[slot, : len(ids)] = ids


def fill_rows(tables: SlotTables, rows: StepRows) -> None:
    """Fill the tensors of `rows` from `rows.header`.

    `tables.num_computed` is set to the position after each request's last row. If a step has only
    decodes of one row each, it must have no padding, which the code for this case cannot handle.
    This code takes 79 us on a busy CPU, and `fill_any_rows` takes 495 us.
    """
    if rows.num_chunks or rows.rows_per_decode != 1:
        fill_any_rows(tables, rows)
        return
    slots, sampled = rows.header[0], rows.sampled
    positions = torch.index_select(tables.num_computed, 0, slots, out=rows.positions)
    ends = torch.add(positions, 1, out=sampled.positions)
    tables.num_computed.index_copy_(0, slots, ends)
    rows.input_ids.copy_(tables.tokens[slots, positions])
    for table, mapping in zip(tables.block_tables, rows.slot_mapping, strict=True):
        _cache_rows(table, tables.block_size, slots, positions, mapping)
    rows.slots.copy_(slots)
    rows.context_lens.copy_(ends)
    sampled.slots.copy_(slots)
    torch.index_select(tables.temperatures, 0, slots, out=sampled.temperatures)
    torch.index_select(tables.seeds, 0, slots, out=sampled.seeds)
    torch.arange(len(slots), out=sampled.rows)
    torch.arange(len(slots) + 1, out=rows.query_start)


def fill_any_rows(tables: SlotTables, rows: StepRows) -> None:
    """Do what `fill_rows` does. The step may have prefill chunks and padding rows."""
    slots, start, counts, first, place, num_sampled = rows.header
    live = slots != tables.padding_slot
    begin = torch.where(start < 0, tables.num_computed[slots], start) * live
    tables.num_computed[slots] = ends = (begin + counts) * live
    request = torch.repeat_interleave(counts)
    row_slots, row_live = slots[request], live[request]
    positions = (begin - first)[request] + torch.arange(len(request), device=slots.device)
    positions *= row_live
    entries = torch.where(place < 0, 0, num_sampled.clamp(min=1))
    owner = torch.repeat_interleave(entries)
    nth = torch.arange(len(owner), device=slots.device) - (entries.cumsum(0) - entries)[owner]
    drawn = (live & (num_sampled > 0))[owner]
    sampled_slots = torch.where(drawn, slots[owner], tables.padding_slot)
    behind = num_sampled[owner] - nth
    for table, mapping in zip(tables.block_tables, rows.slot_mapping, strict=True):
        places = _cache_rows(table, tables.block_size, row_slots, positions)
        mapping[: len(places)] = places.where(row_live, -1)
    for out, values in (
        (rows.input_ids, tables.tokens[row_slots, positions] * row_live),
        (rows.positions, positions),
        (rows.slots, slots),
        (rows.context_lens, ends),
        (rows.query_start, torch.cat((first, first[-1:] + counts[-1:]))),
    ):
        out[: len(values)] = values
    sampled, at = rows.sampled, place[owner] + nth
    sampled.rows[at] = ((first + counts)[owner] - behind) * drawn
    sampled.slots[at] = sampled_slots
    sampled.positions[at] = (ends[owner] - behind + 1) * drawn
    sampled.temperatures[at] = tables.temperatures[sampled_slots].where(drawn, 0.0)
    sampled.seeds[at] = tables.seeds[sampled_slots] * drawn.unsqueeze(1)


def write_tokens(tables: SlotTables, sampled: SampledRows, tokens: Tensor) -> None:
    """Store the sampled `tokens`, int64 [R], in `sampled.tokens` and in `tables.tokens`.

    `tables.tokens` gets 0 for a token below 0 (`NO_TOKEN`): a step in flight may embed the token.
    """
    sampled.tokens.copy_(tokens)
    # Tokens sampled for padding are stored for the padding slot, where nothing reads them.
    tables.tokens[sampled.slots, sampled.positions] = tokens.clamp(min=0).to(tables.tokens.dtype)


def _cache_rows(
    table: Tensor, block_size: int, slots: Tensor, at: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return the index in `KVLayer.flat` of position `at[i]` of the request in slot `slots[i]`."""
    blocks = table[slots, at // block_size].long()
    return torch.add(at % block_size, blocks, alpha=block_size, out=out)
