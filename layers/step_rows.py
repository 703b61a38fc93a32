"""Device tensors for the rows (tokens) of a step, made from device tables of all requests.

The functions here are in plain torch; `layers.kernels.step_rows` has them as Triton kernels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layers.attention.base import AttentionBatch

_PER_ROW = ("input_ids", "positions", "slot_mapping")


@dataclass(frozen=True, slots=True)
class SlotTables:
    """What the device knows of each running request. A slot is a request's row in these tables.

    The last row, `padding_slot`, is for padding. Triton kernels neither read nor write that row.

    Attributes:
        tokens: [slots + 1, max_model_len] int32 prompt and sampled tokens.
        block_tables: [slots + 1, max_blocks] int32 block ids.
        num_computed, seeds: [slots + 1] int64 number of computed positions, and seed of the noise.
        temperatures: [slots + 1] float32.
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
        zeros = functools.partial(torch.zeros, device=device)
        rows, blocks = num_slots + 1, -(-max_model_len // block_size)
        tokens, tables = (zeros(rows, n, dtype=torch.int32) for n in (max_model_len, blocks))
        computed, seeds = (zeros(rows, dtype=torch.int64) for _ in range(2))
        temperatures = zeros(rows, dtype=torch.float32)
        return SlotTables(tokens, tables, computed, temperatures, seeds, block_size)

    @property
    def padding_slot(self) -> int:
        return self.num_computed.shape[0] - 1


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The R rows of a step whose next token is sampled: [R] int64, `temperatures` [R] float32.

    `rows` are indices of rows of the step. `slots` and `positions` say where in `SlotTables.tokens`
    the sampled token goes. `tokens` is unset until the tokens are sampled. Padding has the
    padding slot in `slots`, and 0 in the other tensors.
    """

    rows: Tensor
    slots: Tensor
    positions: Tensor
    temperatures: Tensor
    seeds: Tensor
    tokens: Tensor

    @staticmethod
    def empty(size: int, device: torch.device) -> SampledRows:
        types = (torch.int64,) * 3 + (torch.float32,) + (torch.int64,) * 2
        return SampledRows(*(torch.empty(size, dtype=t, device=device) for t in types))

    def __getitem__(self, part: slice | Tensor) -> SampledRows:
        return SampledRows(*(getattr(self, name)[part] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class StepRows:
    """The T rows (tokens) of a step of B requests: rows of prefill chunks first, then of decodes.

    Attributes:
        header: [6, B] int64, from which `fill_rows` makes all other tensors. For each request:
            slot; first position (-1: the first position that is not computed yet); number of rows;
            index of the first row; index of its first entry in `sampled` (-1: no entry); number of
            its last rows that are sampled. An entry without a sampled row is padding.
        input_ids, positions, slot_mapping: [T] int64 token ids, positions, and rows of
            `KVLayer.flat` for K and V; 0, 0 and -1 for padding, which only captured steps have.
        slots, context_lens: [B] int32, see `AttentionBatch`. Padding has the padding slot and 0.
        query_start: [B + 1] int32 first row of each request, then T.
        num_chunks, num_chunk_rows: number of prefill chunks, and of their rows together.
    """

    header: Tensor
    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    slots: Tensor
    context_lens: Tensor
    query_start: Tensor
    sampled: SampledRows
    num_chunks: int = 0
    num_chunk_rows: int = 0
    longest_chunk: int = 0
    rows_per_decode: int = 1

    @staticmethod
    def empty(header: Tensor, num_rows: int, sampled: SampledRows | int, **counts: int) -> StepRows:
        """Allocate unset rows; `sampled` may be a number of rows, `counts` are integer fields."""
        device, requests = header.device, header.shape[1]
        if isinstance(sampled, int):
            sampled = SampledRows.empty(sampled, device)
        ids, positions, mapping = torch.empty(3, num_rows, dtype=torch.int64, device=device)
        slots, lens = torch.empty(2, requests, dtype=torch.int32, device=device)
        start = torch.empty(requests + 1, dtype=torch.int32, device=device)
        return StepRows(header, ids, positions, mapping, slots, lens, start, sampled, **counts)

    def first_rows(self, count: int) -> StepRows:
        """The same prefill chunks, with views of the tensors' first `count` rows."""
        rows = {name: getattr(self, name)[:count] for name in _PER_ROW}
        return replace(self, **rows, num_chunk_rows=count, longest_chunk=count)

    def first_decodes(self, count: int) -> StepRows:
        """Views of the first `count` decodes; only for steps without prefill chunks."""
        rows = count * self.rows_per_decode
        return replace(
            self,
            header=self.header[:, :count],
            slots=self.slots[:count],
            context_lens=self.context_lens[:count],
            query_start=self.query_start[: count + 1],
            sampled=self.sampled[:rows],
            **{name: getattr(self, name)[:rows] for name in _PER_ROW},
        )

    def attention(self, block_tables: Tensor) -> AttentionBatch:
        """The requests and their rows as an attention backend needs them."""
        start = self.query_start[: self.num_chunks + 1]
        counts = self.num_chunks, self.num_chunk_rows, self.longest_chunk, self.rows_per_decode
        return AttentionBatch(block_tables, self.slots, self.context_lens, start, *counts)


def enter_requests(
    tables: SlotTables, header: Tensor, temperatures: Tensor, token_ids: Tensor, longest: int
) -> None:
    """Write N new requests into the tables.

    `header` is [4, N] int64. For each request: slot; index of its first id in `token_ids`; number
    of its ids, at most `longest`; seed.
    """
    del longest
    slots, _, counts, seeds = header
    tables.temperatures[slots] = temperatures
    tables.seeds[slots] = seeds
    parts = torch.split(token_ids, counts.tolist())
    for slot, ids in zip(slots.tolist(), parts, strict=True):
        tables.tokens[slot, : len(ids)] = ids


def fill_rows(tables: SlotTables, rows: StepRows) -> None:
    """Set all tensors of `rows` from its header; from then on the rows count as computed.

    A step of decodes with one row each must not have padding. Such a step has shorter code here:
    on a loaded CPU it takes 79 us, and `fill_any_rows` took 495 us.
    """
    if rows.num_chunks or rows.rows_per_decode != 1:
        fill_any_rows(tables, rows)
        return
    slots, sampled = rows.header[0], rows.sampled
    positions = torch.index_select(tables.num_computed, 0, slots, out=rows.positions)
    ends = torch.add(positions, 1, out=sampled.positions)
    tables.num_computed.index_copy_(0, slots, ends)
    rows.input_ids.copy_(tables.tokens[slots, positions])
    _cache_rows(tables, slots, positions, rows.slot_mapping)
    rows.slots.copy_(slots)
    rows.context_lens.copy_(ends)
    sampled.slots.copy_(slots)
    torch.index_select(tables.temperatures, 0, slots, out=sampled.temperatures)
    torch.index_select(tables.seeds, 0, slots, out=sampled.seeds)
    torch.arange(len(slots), out=sampled.rows)
    torch.arange(len(slots) + 1, out=rows.query_start)


def fill_any_rows(tables: SlotTables, rows: StepRows) -> None:
    """Do the same as `fill_rows` for any step; tensors of `rows` may be longer than needed."""
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
    for out, values in (
        (rows.input_ids, tables.tokens[row_slots, positions] * row_live),
        (rows.positions, positions),
        (rows.slot_mapping, _cache_rows(tables, row_slots, positions).where(row_live, -1)),
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
    sampled.seeds[at] = tables.seeds[sampled_slots] * drawn


def write_tokens(tables: SlotTables, sampled: SampledRows, tokens: Tensor) -> None:
    """Store sampled tokens [R] int64 in `sampled`, and in `tables` for the next step to read."""
    sampled.tokens.copy_(tokens)
    # Padding writes to the row of the padding slot, which nothing reads.
    tables.tokens[sampled.slots, sampled.positions] = tokens.to(tables.tokens.dtype)


def _cache_rows(tables: SlotTables, slots: Tensor, at: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the rows of `KVLayer.flat` for positions `at` of `slots`, int64."""
    blocks = tables.block_tables[slots, at // tables.block_size].long()
    return torch.add(at % tables.block_size, blocks, alpha=tables.block_size, out=out)
