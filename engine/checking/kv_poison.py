"""NaN in dead KV blocks, and a look at what steps write: the device's part of the sanitizer."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.types import StepPlan
from layers.step_rows import SlotTables
from memory.kv_cache import KVLayer
from utils.errors import KVSanitizerError


class KVPoison:
    """Fills dead blocks before a step and looks for NaN in what it wrote, after it.

    What was read from a dead block makes the keys and values of the following layers NaN, so
    the last layer's are looked at.

    Args:
        kv: the pages of every layer.
        tables: the runner's per-slot tables.
        block_size: tokens per block.
    """

    def __init__(self, kv: list[KVLayer], tables: SlotTables, block_size: int) -> None:
        self._kv = kv
        self._tables = tables
        self._block_size = block_size
        self._requests: dict[int, int] = {}

    def fill(self, plan: StepPlan) -> None:
        """Poison the plan's dead blocks, in the order of the current stream."""
        # This runner has one cache group.
        for group in plan.poisoned_blocks:
            blocks = torch.tensor(group, dtype=torch.int64, device=self._tables.block_tables.device)
            for layer in self._kv:
                layer.k[blocks] = layer.v[blocks] = float("nan")

    def check(self, plan: StepPlan) -> None:
        """Wait for the step and look at the rows that it wrote.

        Raises:
            KVSanitizerError: one of them is NaN.
        """
        self._requests |= {new.slot: new.request_id for new in plan.new_requests}
        slots, positions = self._written(plan)
        blocks = self._tables.block_tables[slots, positions // self._block_size].long()
        rows = self._kv[-1].flat[blocks * self._block_size + positions % self._block_size]
        bad = rows.isnan().flatten(1).any(1).nonzero()
        if len(bad):
            first = int(bad[0])
            raise KVSanitizerError(
                plan.step_id,
                self._requests[int(slots[first])],
                int(blocks[first]),
                f"position {int(positions[first])} is NaN: the model, or a read of a dead block",
            )

    def _written(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Slot and position of every row of the step."""
        device = self._tables.num_computed.device
        decodes = torch.tensor(plan.decode, dtype=torch.int64, device=device)
        slots, positions = [decodes], [self._tables.num_computed[decodes] - 1]
        for chunk in plan.prefill:
            end = chunk.start + chunk.num_tokens
            positions.append(torch.arange(chunk.start, end, device=device))
            slots.append(torch.full_like(positions[-1], chunk.slot))
        return torch.cat(slots), torch.cat(positions)
