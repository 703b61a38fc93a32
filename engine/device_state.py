"""What the device knows of the running requests, and the rows of a step made from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepPlan
from layers import step_rows as reference
from layers.kernels.launch import has_triton
from layers.step_rows import SampledRows, SlotTables, StepRows

Array = np.ndarray[Any, Any]

# Two steps may be under way while a third one is prepared.
_NUM_BUFFERS = 3


class Staging:
    """Uploads a step's arrays through pinned memory, a few buffers taking turns.

    A copy from pinned memory returns at once, and the device reads the memory later. So a buffer
    is written again only when the copies out of it are known to have ended.

    Args:
        device: where to. On a CPU arrays are wrapped in place.
        num_bytes: first size of a buffer; it grows when a step brings more.
    """

    def __init__(self, device: torch.device, num_bytes: int = 1 << 20) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._turn = 0
        self._used = 0
        if self._cuda:
            self._buffers = [_pinned(num_bytes) for _ in range(_NUM_BUFFERS)]
            self._read = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]

    @contextmanager
    def group(self) -> Iterator[None]:
        """The uploads of one step, on the current stream."""
        if not self._cuda:
            yield
            return
        self._turn = (self._turn + 1) % len(self._buffers)
        self._used = 0
        self._read[self._turn].synchronize()
        try:
            yield
        finally:
            self._read[self._turn].record()

    def upload(self, array: Array, out: Tensor | None = None) -> Tensor:
        """The array as a tensor on the device; the array itself must not be written any more.

        Args:
            out: where to put it, of the same shape and type; made when absent.
        """
        source = torch.from_numpy(array)
        if not self._cuda:
            return source if out is None else out.copy_(source)
        size = array.nbytes
        buffer = self._buffers[self._turn]
        if self._used + size > buffer.numel():
            # Copies from the old buffer may be under way; torch's pinned allocator keeps the
            # memory back until they end.
            buffer = self._buffers[self._turn] = _pinned(2 * (self._used + size))
            self._used = 0
        pinned = buffer[self._used : self._used + size].view(source.dtype).view(source.shape)
        pinned.copy_(source)
        # Every array starts on a multiple of 16 bytes, whatever its type.
        self._used += -(-size // 16) * 16
        if out is None:
            return pinned.to(self._device, non_blocking=True)
        return out.copy_(pinned, non_blocking=True)


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class DeviceState:
    """The per-slot tables of a runner: plans change them, and their rows are read from them.

    Plans bring only changes. Tokens that the runner sampled never leave the device to come back.

    Args:
        tables: empty ones.
        staging: uploads what plans bring; a group of uploads has to have begun.
        kernels: make rows by Triton kernels; by default where there is a device for them.
    """

    def __init__(self, tables: SlotTables, staging: Staging, kernels: bool | None = None) -> None:
        self.tables = tables
        self.staging = staging
        self._ops: Any = reference
        if tables.tokens.is_cuda and has_triton() if kernels is None else kernels:
            from layers.kernels import step_rows

            self._ops = step_rows
        self._random_slots: set[int] = set()
        self._decode: tuple[int, ...] = ()
        self._decode_rows: StepRows | None = None

    def apply(self, plan: StepPlan) -> None:
        """Take in the plan's new requests and block tables."""
        if plan.new_requests:
            self._enter(plan.new_requests)
        if plan.block_updates:
            self._extend(plan.block_updates)

    def rows(self, plan: StepPlan) -> StepRows:
        """The rows of a plan whose changes are taken in; they count as computed from then on."""
        if plan.prefill or plan.decode != self._decode or self._decode_rows is None:
            header = header_of([*map(_column, plan.prefill), *((s, -1, 1, 1) for s in plan.decode)])
            rows = StepRows.empty(
                self.staging.upload(header),
                int(header[2].sum()),
                int(header[5].sum()),
                num_chunks=len(plan.prefill),
                num_chunk_rows=plan.num_prefill_tokens,
                longest_chunk=max((chunk.num_tokens for chunk in plan.prefill), default=0),
            )
            # Most steps decode the same requests as the one before.
            self._decode, self._decode_rows = plan.decode, None if plan.prefill else rows
        else:
            rows = self._decode_rows
        self.fill(rows)
        return rows

    def fill(self, rows: StepRows) -> None:
        """Make what `rows` has from its header; its rows count as computed from then on."""
        self._ops.fill_rows(self.tables, rows)

    def write(self, sampled: SampledRows, tokens: Tensor) -> None:
        """Store drawn tokens [R] int64 where the next step reads them."""
        self._ops.write_tokens(self.tables, sampled, tokens)

    def all_greedy(self, plan: StepPlan) -> bool:
        """Whether every token that the plan samples is taken greedily."""
        return not self._random_slots or self._random_slots.isdisjoint(plan.sampled_slots)

    def _enter(self, requests: tuple[NewRequest, ...]) -> None:
        upload = self.staging.upload
        ids = [np.array(r.token_ids, dtype=np.int32) for r in requests]
        counts = [len(i) for i in ids]
        firsts = np.cumsum([0, *counts[:-1]])
        slots, seeds = [r.slot for r in requests], [r.seed for r in requests]
        temperatures = [r.sampling.temperature for r in requests]
        self._ops.enter_requests(
            self.tables,
            upload(np.array([slots, firsts, counts, seeds], dtype=np.int64)),
            upload(np.array(temperatures, dtype=np.float32)),
            upload(np.concatenate(ids)),
            max(counts),
        )
        self._random_slots.difference_update(slots)
        self._random_slots.update(r.slot for r in requests if r.sampling.temperature > 0)

    def _extend(self, updates: tuple[BlockUpdate, ...]) -> None:
        table = self.tables.block_tables
        width = table.shape[1]
        at = [u.slot * width + u.first_index + i for u in updates for i in range(len(u.block_ids))]
        ids = [block for update in updates for block in update.block_ids]
        where = self.staging.upload(np.array(at, dtype=np.int64))
        blocks = self.staging.upload(np.array(ids, dtype=np.int32))
        table.view(-1).index_copy_(0, where, blocks)


def _column(chunk: PrefillChunk) -> tuple[int, int, int, int]:
    return chunk.slot, chunk.start, chunk.num_tokens, int(chunk.samples)


def header_of(columns: list[tuple[int, int, int, int]]) -> Array:
    """The header of `StepRows`, with the sampled rows in order.

    Args:
        columns: slot, first position, number of rows and of sampled rows of each request.
    """
    header = np.empty((6, len(columns)), dtype=np.int64)
    header[[0, 1, 2, 5]] = np.array(columns, dtype=np.int64).T
    counts, num_sampled = header[2], header[5]
    header[3] = np.cumsum(counts) - counts
    header[4] = np.where(num_sampled > 0, np.cumsum(num_sampled) - num_sampled, -1)
    return header


def chunks_header(
    chunks: tuple[PrefillChunk, ...], width: int, num_rows: int, padding: int
) -> Array:
    """The header of `StepRows` for prefill chunks of a captured step.

    It has `width` requests and one more for the padding behind the last chunk's rows. The sampled
    rows are the last ones of `width` places, so that those of decodes may follow.

    Args:
        width: at least as many as there are chunks.
        num_rows: rows of the step, padding included.
        padding: the slot for padding.
    """
    columns = [*map(_column, chunks)]
    left = num_rows - sum(chunk.num_tokens for chunk in chunks)
    columns += [(padding, 0, 0, 0)] * (width - len(columns)) + [(padding, 0, left, 0)]
    header = header_of(columns)
    samples = header[5, :-1] > 0
    # Sampled rows to the end of the places, padding before them.
    header[4, np.concatenate((np.flatnonzero(~samples), np.flatnonzero(samples)))] = range(width)
    return header
