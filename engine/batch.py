"""From a step's plan to the tensors of a forward pass, through per-slot tables on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.types import NewRequest, StepPlan
from layers.attention.base import AttentionBatch


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's rows as tensors: T tokens of B requests, R of which get a new token.

    Attributes:
        input_ids, positions, slot_mapping: [T] int64, see `ForwardBatch`.
        attention: which request each token belongs to.
        sampled_rows: [R] int64 rows of the T to sample from; None if all of them are.
        sampled_slots: [R] int64 slot of each new token.
        sampled_positions: [R] int64 position of each new token.
        all_greedy: every new token is taken greedily.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    attention: AttentionBatch
    sampled_rows: Tensor | None
    sampled_slots: Tensor
    sampled_positions: Tensor
    all_greedy: bool


class SlotTables:
    """What the runner knows of each running request, one row per slot.

    Plans bring only changes; tokens that the runner sampled never leave the device to come
    back. A row is valid from its `NewRequest` to the next one.

    Attributes:
        tokens: [slots, max_model_len] int32 prompt and sampled tokens.
        block_tables: [slots, max_blocks] int32.
        num_computed: [slots] int64 positions computed so far.
        temperatures: [slots] float32.
        seeds: [slots] int64.
    """

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        max_blocks = -(-max_model_len // block_size)
        self._block_size = block_size
        self._device = device
        self.tokens = torch.zeros(num_slots, max_model_len, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self.num_computed = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.temperatures = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._random_slots: set[int] = set()
        self._last_decode: tuple[tuple[int, ...], Tensor] = ((), self._int64([]))

    def stage(self, plan: StepPlan) -> StepInputs:
        """Take in the plan's changes and gather its rows; positions count as computed."""
        for request in plan.new_requests:
            self._enter(request)
        for update in plan.block_updates:
            last = update.first_index + len(update.block_ids)
            ids = torch.tensor(update.block_ids, dtype=torch.int32, device=self._device)
            self.block_tables[update.slot, update.first_index : last] = ids
        decode_slots = self._decode_slots(plan.decode)
        if plan.prefill:
            return self._mixed(plan, decode_slots)
        positions = self.num_computed[decode_slots]
        context_lens = positions + 1
        self.num_computed[decode_slots] = context_lens
        return self._inputs(plan, decode_slots, positions, decode_slots, context_lens, [0], None)

    def write_back(self, inputs: StepInputs, sampled: Tensor) -> None:
        """Store the new tokens [R] where the next step reads them."""
        tokens = sampled.to(self.tokens.dtype)
        self.tokens[inputs.sampled_slots, inputs.sampled_positions] = tokens

    def _int64(self, values: list[int] | tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _enter(self, request: NewRequest) -> None:
        slot, ids = request.slot, request.token_ids
        self.tokens[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32, device=self._device)
        self.temperatures[slot] = request.sampling.temperature
        self.seeds[slot] = request.seed
        if request.sampling.temperature > 0:
            self._random_slots.add(slot)
        else:
            self._random_slots.discard(slot)

    def _decode_slots(self, decode: tuple[int, ...]) -> Tensor:
        # Most steps decode the same requests as the one before.
        if decode != self._last_decode[0]:
            self._last_decode = (decode, self._int64(decode))
        return self._last_decode[1]

    def _mixed(self, plan: StepPlan, decode_slots: Tensor) -> StepInputs:
        chunks = plan.prefill
        counts = self._int64([chunk.num_tokens for chunk in chunks])
        chunk_slots = self._int64([chunk.slot for chunk in chunks])
        ends = self._int64([chunk.start + chunk.num_tokens for chunk in chunks])
        positions = torch.cat(
            [torch.arange(c.start, c.start + c.num_tokens, device=self._device) for c in chunks]
            + [self.num_computed[decode_slots]]
        )
        context_lens = torch.cat((ends, self.num_computed[decode_slots] + 1))
        slots = torch.cat((chunk_slots, decode_slots))
        self.num_computed[slots] = context_lens
        token_slots = torch.cat((chunk_slots.repeat_interleave(counts), decode_slots))
        query_start = [0]
        for chunk in chunks:
            query_start.append(query_start[-1] + chunk.num_tokens)
        rows = [last - 1 for c, last in zip(chunks, query_start[1:], strict=True) if c.samples]
        rows += range(query_start[-1], query_start[-1] + len(plan.decode))
        return self._inputs(plan, token_slots, positions, slots, context_lens, query_start, rows)

    def _inputs(
        self,
        plan: StepPlan,
        token_slots: Tensor,
        positions: Tensor,
        slots: Tensor,
        context_lens: Tensor,
        query_start: list[int],
        rows: list[int] | None,
    ) -> StepInputs:
        size = self._block_size
        blocks = self.block_tables[token_slots, positions // size].long()
        sampled_slots, sampled_positions = slots, context_lens
        if not all(chunk.samples for chunk in plan.prefill):
            keep = [i for i, chunk in enumerate(plan.prefill) if chunk.samples]
            keep += range(len(plan.prefill), len(slots))
            kept = self._int64(keep)
            sampled_slots, sampled_positions = slots[kept], context_lens[kept]
        return StepInputs(
            input_ids=self.tokens[token_slots, positions].long(),
            positions=positions,
            slot_mapping=blocks * size + positions % size,
            attention=AttentionBatch(
                block_tables=self.block_tables,
                slots=slots,
                context_lens=context_lens,
                query_start=self._int64(query_start),
                num_prefills=len(plan.prefill),
                max_query_len=max((c.num_tokens for c in plan.prefill), default=0),
                max_context_len=max((c.start + c.num_tokens for c in plan.prefill), default=0),
            ),
            sampled_rows=None if rows is None else self._int64(rows),
            sampled_slots=sampled_slots,
            sampled_positions=sampled_positions,
            all_greedy=self._random_slots.isdisjoint(plan.sampled_slots),
        )
