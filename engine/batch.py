"""From a step's plan to the tensors of a forward pass, through per-slot tables on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.staging import Staging
from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepPlan
from layers.attention.base import AttentionBatch
from layers.kernels.launch import has_triton

if TYPE_CHECKING:
    from layers.kernels.slots import StepRows


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's rows as tensors: T tokens of B requests, R of which get a new token.

    Attributes:
        input_ids, positions, slot_mapping: [T] int64, see `ForwardBatch`.
        attention: which request each token belongs to.
        sampled_rows: [R] int64 rows of the T to sample from; None if all of them are.
        sampled_slots: [R] int64 slot of each new token.
        sampled_positions: [R] int64 position of each new token.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    attention: AttentionBatch
    sampled_rows: Tensor | None
    sampled_slots: Tensor
    sampled_positions: Tensor


class SlotTables:
    """What the runner knows of each running request, one row per slot.

    Plans bring only changes; tokens that the runner sampled never leave the device to come
    back. A row is valid from its `NewRequest` to the next one. There is one row more than
    slots, for the padding of captured batches.

    Attributes:
        tokens: [slots + 1, max_model_len] int32 prompt and sampled tokens.
        block_tables: [slots + 1, max_blocks] int32.
        num_computed: [slots + 1] int64 positions computed so far.
        temperatures: [slots + 1] float32.
        seeds: [slots + 1] int64.
    """

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        rows = num_slots + 1
        self._block_size = block_size
        self._staging = Staging(device)
        self._kernels = device.type == "cuda" and has_triton()
        shape = (rows, -(-max_model_len // block_size))
        self.tokens = torch.zeros(rows, max_model_len, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        self.num_computed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.temperatures = torch.zeros(rows, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._random_slots: set[int] = set()
        self._decode: tuple[int, ...] = ()
        self._decode_slots = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def padding_slot(self) -> int:
        """The row that belongs to no request."""
        return self.num_computed.shape[0] - 1

    def stage(self, plan: StepPlan) -> StepInputs:
        """Take in the plan's changes and gather its rows; their positions count as computed."""
        self._staging.begin()
        self._apply(plan)
        if plan.prefill and self._kernels:
            inputs = self._mixed_by_kernel(plan)
        else:
            if plan.decode != self._decode:
                # Most steps decode the same requests as the one before.
                self._decode, self._decode_slots = plan.decode, self._int64(plan.decode)
            inputs = self._mixed(plan) if plan.prefill else self._pure_decode()
        self._staging.end()
        return inputs

    def stage_prefill(self, plan: StepPlan, rows: StepRows) -> None:
        """Take in a plan and fill `rows` with its prefill, those that it does not need as padding.

        Chunk i is sampled at place i, if it samples. Needs Triton, and one request more in
        `rows` than the plan has, for the padding behind the last token.
        """
        self._staging.begin()
        self._apply(plan)
        header = np.zeros((6, rows.slots.shape[0]), dtype=np.int64)
        header[0] = self.padding_slot
        header[3] = plan.num_prefill_tokens
        header[4] = range(header.shape[1])
        self._describe(header, plan.prefill)
        # The last request is the padding behind the last token.
        header[2, -1] = rows.input_ids.shape[0] - plan.num_prefill_tokens
        header[4, -1] = -1
        self._gather(header, rows)
        self._staging.end()

    def stage_changes(self, plan: StepPlan, slots: Tensor) -> None:
        """Take in a decode plan's changes and write its slots, padded, to `slots` [>= B]."""
        self._staging.begin()
        self._apply(plan)
        padded = np.full(slots.shape[0], self.padding_slot, dtype=np.int64)
        padded[: len(plan.decode)] = plan.decode
        slots.copy_(self._staging.upload(padded))
        self._staging.end()

    def apply_changes(self, plan: StepPlan) -> None:
        """Take in the plan's changes alone."""
        if plan.new_requests or plan.block_updates:
            self._staging.begin()
            self._apply(plan)
            self._staging.end()

    def all_greedy(self, plan: StepPlan) -> bool:
        """Whether every token that the plan samples is taken greedily."""
        return not self._random_slots or self._random_slots.isdisjoint(plan.sampled_slots)

    def write_back(self, inputs: StepInputs, sampled: Tensor) -> None:
        """Store the new tokens [R] where the next step reads them."""
        tokens = sampled.to(self.tokens.dtype)
        self.tokens[inputs.sampled_slots, inputs.sampled_positions] = tokens

    def _int64(self, values: list[int] | tuple[int, ...]) -> Tensor:
        return self._staging.upload(np.array(values, dtype=np.int64))

    def _apply(self, plan: StepPlan) -> None:
        if plan.new_requests:
            self._enter(plan.new_requests)
        if plan.block_updates:
            self._extend(plan.block_updates)

    def _enter(self, requests: tuple[NewRequest, ...]) -> None:
        slots = [request.slot for request in requests]
        ids = [np.array(r.token_ids, dtype=np.int32) for r in requests]
        temperatures = [request.sampling.temperature for request in requests]
        seeds = [request.seed for request in requests]
        temperature_array = np.array(temperatures, dtype=np.float32)
        if self._kernels:
            self._enter_by_kernel(slots, ids, temperature_array, seeds)
        else:
            width = self.tokens.shape[1]
            pairs = zip(slots, ids, strict=True)
            at = [np.arange(len(i), dtype=np.int64) + slot * width for slot, i in pairs]
            self._scatter(self.tokens, np.concatenate(at), np.concatenate(ids))
            where = self._int64(slots)
            self.temperatures[where] = self._staging.upload(temperature_array)
            self.seeds[where] = self._int64(seeds)
        for slot, temperature in zip(slots, temperatures, strict=True):
            if temperature > 0:
                self._random_slots.add(slot)
            else:
                self._random_slots.discard(slot)

    def _enter_by_kernel(
        self,
        slots: list[int],
        ids: list[np.ndarray[Any, Any]],
        temperatures: np.ndarray[Any, Any],
        seeds: list[int],
    ) -> None:
        from layers.kernels.slots import enter_requests

        upload = self._staging.upload
        counts = [len(i) for i in ids]
        firsts = np.cumsum([0, *counts[:-1]])
        enter_requests(
            upload(np.array([slots, firsts, counts, seeds], dtype=np.int64)),
            upload(temperatures),
            upload(np.concatenate(ids)),
            longest=max(counts),
            tokens=self.tokens,
            out_temperatures=self.temperatures,
            out_seeds=self.seeds,
        )

    def _extend(self, updates: tuple[BlockUpdate, ...]) -> None:
        width = self.block_tables.shape[1]
        at = [u.slot * width + u.first_index + i for u in updates for i in range(len(u.block_ids))]
        ids = [block for update in updates for block in update.block_ids]
        self._scatter(
            self.block_tables, np.array(at, dtype=np.int64), np.array(ids, dtype=np.int32)
        )

    def _scatter(
        self, table: Tensor, at: np.ndarray[Any, Any], values: np.ndarray[Any, Any]
    ) -> None:
        upload = self._staging.upload
        table.view(-1).index_copy_(0, upload(at), upload(values))

    def _pure_decode(self) -> StepInputs:
        slots = self._decode_slots
        positions = self.num_computed.index_select(0, slots)
        context_lens = positions + 1
        self.num_computed.index_copy_(0, slots, context_lens)
        attention = AttentionBatch(
            block_tables=self.block_tables,
            slots=slots,
            context_lens=context_lens,
            query_start=slots[:0],
            num_prefills=0,
            num_prefill_tokens=0,
            max_query_len=0,
        )
        return self._inputs(slots, positions, attention, None, slots, context_lens)

    def _mixed_by_kernel(self, plan: StepPlan) -> StepInputs:
        """As `_mixed`, the reference, in one kernel."""
        from layers.kernels.slots import StepRows

        chunks, num_decodes = plan.prefill, len(plan.decode)
        num_tokens = plan.num_prefill_tokens
        header = np.empty((6, len(chunks) + num_decodes), dtype=np.int64)
        samples = self._describe(header, chunks)
        header[0, len(chunks) :] = plan.decode
        header[1, len(chunks) :] = -1
        header[2, len(chunks) :] = 1
        header[3, len(chunks) :] = range(num_tokens, num_tokens + num_decodes)
        header[5, len(chunks) :] = 1
        header[4] = np.where(header[5], np.cumsum(header[5]) - 1, -1)
        rows = StepRows.empty(
            num_tokens + num_decodes,
            header.shape[1],
            samples + num_decodes,
            self.tokens.device,
        )
        self._gather(header, rows)
        attention = AttentionBatch(
            block_tables=self.block_tables,
            slots=rows.slots,
            context_lens=rows.context_lens,
            query_start=rows.query_start[: len(chunks) + 1],
            num_prefills=len(chunks),
            num_prefill_tokens=num_tokens,
            max_query_len=max(chunk.num_tokens for chunk in chunks),
        )
        return StepInputs(
            input_ids=rows.input_ids,
            positions=rows.positions,
            slot_mapping=rows.slot_mapping,
            attention=attention,
            sampled_rows=rows.sampled_rows,
            sampled_slots=rows.sampled_slots,
            sampled_positions=rows.sampled_positions,
        )

    @staticmethod
    def _describe(header: np.ndarray[Any, Any], chunks: tuple[PrefillChunk, ...]) -> int:
        """Fill in the chunks' columns, all but row 4; returns how many chunks sample."""
        first = 0
        for i, chunk in enumerate(chunks):
            header[:4, i] = chunk.slot, chunk.start, chunk.num_tokens, first
            header[5, i] = chunk.samples
            first += chunk.num_tokens
        return int(header[5, : len(chunks)].sum())

    def _gather(self, header: np.ndarray[Any, Any], rows: StepRows) -> None:
        from layers.kernels.slots import gather_rows

        gather_rows(
            self._staging.upload(header),
            self.tokens,
            self.block_tables,
            self.num_computed,
            block_size=self._block_size,
            longest=int(header[2].max()),
            out=rows,
        )

    def _mixed(self, plan: StepPlan) -> StepInputs:
        chunks, decode_slots = plan.prefill, self._decode_slots
        counts = np.array([chunk.num_tokens for chunk in chunks], dtype=np.int64)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        chunk_slots = np.array([chunk.slot for chunk in chunks], dtype=np.int64)
        query_start = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts)))
        num_rows = int(query_start[-1])
        shift = np.repeat(starts - query_start[:-1], counts)
        decoding = self.num_computed[decode_slots]
        positions = torch.cat((self._staging.upload(np.arange(num_rows) + shift), decoding))
        token_slots = self._staging.upload(np.repeat(chunk_slots, counts))
        context_lens = torch.cat((self._staging.upload(starts + counts), decoding + 1))
        slots = torch.cat((self._staging.upload(chunk_slots), decode_slots))
        self.num_computed[slots] = context_lens
        samples = np.array([chunk.samples for chunk in chunks], dtype=bool)
        num_decodes = len(plan.decode)
        rows = np.concatenate(
            (query_start[1:][samples] - 1, np.arange(num_rows, num_rows + num_decodes))
        )
        sampled_slots, sampled_positions = slots, context_lens
        if not samples.all():
            decodes = np.arange(len(chunks), len(chunks) + num_decodes)
            kept = self._staging.upload(np.concatenate((np.flatnonzero(samples), decodes)))
            sampled_slots, sampled_positions = slots[kept], context_lens[kept]
        attention = AttentionBatch(
            block_tables=self.block_tables,
            slots=slots,
            context_lens=context_lens,
            query_start=self._staging.upload(query_start),
            num_prefills=len(chunks),
            num_prefill_tokens=num_rows,
            max_query_len=int(counts.max()),
        )
        token_slots = torch.cat((token_slots, decode_slots))
        sampled_rows = self._staging.upload(rows)
        return self._inputs(
            token_slots, positions, attention, sampled_rows, sampled_slots, sampled_positions
        )

    def _inputs(
        self,
        token_slots: Tensor,
        positions: Tensor,
        attention: AttentionBatch,
        sampled_rows: Tensor | None,
        sampled_slots: Tensor,
        sampled_positions: Tensor,
    ) -> StepInputs:
        size = self._block_size
        blocks = self.block_tables[token_slots, positions // size].long()
        return StepInputs(
            input_ids=self.tokens[token_slots, positions].long(),
            positions=positions,
            slot_mapping=blocks * size + positions % size,
            attention=attention,
            sampled_rows=sampled_rows,
            sampled_slots=sampled_slots,
            sampled_positions=sampled_positions,
        )
