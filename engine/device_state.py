"""Device tables of the running requests, from which the device computes the rows of each step.

The slot of a request is its index in the tables. In this file a row of a step is one input token,
with its position and its place in the KV cache. In `engine.types` a row is all work of a step for
one request. The R sampled rows of a step are the rows whose next token is drawn. Padding rows fill
up a CUDA graph's fixed number of rows, and belong to no request.
"""

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
from utils.errors import ContractError

Array = np.ndarray[Any, Any]

# Number of host buffers in `Staging`: two for launched steps, one for the step in preparation.
_NUM_BUFFERS = 3


class Staging:
    """Copies the numpy arrays of each step to the device, through buffers in pinned host memory.

    Steps use the buffers in turn. `upload` may return before the copy to the device has ended. So
    a buffer is written again only after a CUDA event shows that all copies from it have ended.

    Args:
        device: the device that arrays are copied to. On a CPU no buffers are used.
        num_bytes: initial size of each buffer. If a step needs more, its buffer is replaced.
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
        """Context manager within which all arrays of a step are uploaded, on one CUDA stream."""
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
        """Copy `array` to `out` or a new tensor; return that tensor. Never change `array` later."""
        source = torch.from_numpy(array)
        if not self._cuda:
            return source if out is None else out.copy_(source)
        size = array.nbytes
        buffer = self._buffers[self._turn]
        if self._used + size > buffer.numel():
            # Copies from the old buffer may still run. Dropping the buffer is safe: torch reuses
            # pinned memory only after all copies from the memory have ended.
            buffer = self._buffers[self._turn] = _pinned(2 * (self._used + size))
            self._used = 0
        pinned = buffer[self._used : self._used + size].view(source.dtype).view(source.shape)
        pinned.copy_(source)
        # Each array in a buffer starts at a multiple of 16 bytes, an alignment that fits any dtype.
        self._used += -(-size // 16) * 16
        if out is None:
            return pinned.to(self._device, non_blocking=True)
        return out.copy_(pinned, non_blocking=True)


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class DeviceState:
    """Keeps the device tables of the running requests, and computes the rows of each step.

    The host writes only new requests and block table entries into the tables. The device itself
    writes drawn tokens to the token table, so drawn tokens are never uploaded.

    Args:
        staging: copies arrays to the device. Call `apply` and `rows` within `staging.group()`.
        kernels: whether to use Triton kernels; by default True on CUDA if Triton is installed.
    """

    def __init__(self, tables: SlotTables, staging: Staging, kernels: bool | None = None) -> None:
        self.tables = tables
        self.staging = staging
        self._ops: Any = reference
        if tables.tokens.is_cuda and has_triton() if kernels is None else kernels:
            from layers.kernels import step_rows

            self._ops = step_rows
        # Latest request of each slot, if the request has options besides temperature and seed.
        self.special: dict[int, NewRequest] = {}
        self._random_slots: set[int] = set()
        self._decode: tuple[int, ...] = ()
        self._decode_rows: StepRows | None = None

    def apply(self, plan: StepPlan) -> None:
        """Write the plan's new requests and block table entries into the device tables."""
        if plan.new_requests:
            self._enter(plan.new_requests)
        if plan.block_updates:
            self._extend(plan.block_updates)

    def rows(self, plan: StepPlan) -> StepRows:
        """Return the rows of a plan, and update `tables.num_computed`. Call `apply(plan)` first."""
        if plan.prefill or plan.decode != self._decode or self._decode_rows is None:
            header = header_of([*map(_column, plan.prefill), *((s, -1, 1, 1) for s in plan.decode)])
            rows = StepRows.empty(
                self.staging.upload(header),
                int(header[2].sum()),
                int(header[5].sum()),
                groups=len(self.tables.block_tables),
                num_chunks=len(plan.prefill),
                num_chunk_rows=plan.num_prefill_tokens,
                longest_chunk=max((chunk.num_tokens for chunk in plan.prefill), default=0),
            )
            # The next step reuses `rows` if both steps only decode, and decode the same slots.
            self._decode, self._decode_rows = plan.decode, None if plan.prefill else rows
        else:
            rows = self._decode_rows
        self.fill(rows)
        return rows

    def fill(self, rows: StepRows) -> None:
        """Compute all tensors of `rows` from `rows.header`, and update `tables.num_computed`."""
        self._ops.fill_rows(self.tables, rows)

    def write(self, sampled: SampledRows, tokens: Tensor) -> None:
        """Store the drawn tokens, int64 [R], in `sampled.tokens` and in `tables.tokens`."""
        self._ops.write_tokens(self.tables, sampled, tokens)

    def all_greedy(self, plan: StepPlan) -> bool:
        """Return whether every request for which the plan draws a token has temperature 0."""
        return not self._random_slots or self._random_slots.isdisjoint(plan.sampled_slots)

    def _enter(self, requests: tuple[NewRequest, ...]) -> None:
        upload = self.staging.upload
        ids = [np.array(r.token_ids, dtype=np.int32) for r in requests]
        counts = [len(i) for i in ids]
        firsts = np.cumsum([0, *counts[:-1]])
        slots, seeds = [r.slot for r in requests], [r.seed for r in requests]
        streams = [r.sample + (r.seed_kind << 32) for r in requests]
        temperatures = [r.sampling.temperature for r in requests]
        self._ops.enter_requests(
            self.tables,
            upload(np.array([slots, firsts, counts, seeds, streams], dtype=np.int64)),
            upload(np.array(temperatures, dtype=np.float32)),
            upload(np.concatenate(ids)),
            max(counts),
        )
        self._random_slots.difference_update(slots)
        self._random_slots.update(r.slot for r in requests if r.sampling.temperature > 0)
        for request in requests:
            self.special.pop(request.slot, None)
            if request.sampling.needs_logits:
                self.special[request.slot] = request

    def _extend(self, updates: tuple[BlockUpdate, ...]) -> None:
        width = self.tables.block_tables[0].shape[1]
        if any(u.first_index + len(u.block_ids) > width for u in updates):
            raise ContractError(f"a block table has more than {width} entries (max_model_len)")
        for group, table in enumerate(self.tables.block_tables):
            mine = [u for u in updates if u.group == group]
            at = [u.slot * width + u.first_index + i for u in mine for i in range(len(u.block_ids))]
            ids = [block for update in mine for block in update.block_ids]
            if ids:
                where = self.staging.upload(np.array(at, dtype=np.int64))
                blocks = self.staging.upload(np.array(ids, dtype=np.int32))
                table.view(-1).index_copy_(0, where, blocks)


def _column(chunk: PrefillChunk) -> tuple[int, int, int, int]:
    return chunk.slot, chunk.start, chunk.num_tokens, int(chunk.samples)


def header_of(columns: list[tuple[int, int, int, int]]) -> Array:
    """Return `StepRows.header` [6, B] of B requests; sampled rows have the order of `columns`.

    Args:
        columns: for each of the B requests, its slot, the position of its first row, its number of
            rows and its number of sampled rows. Position -1 means the slot's `num_computed`.
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
    """Return `StepRows.header` for prefill chunks that run as a captured CUDA graph.

    A graph always has `width` requests for chunks, with one sampled row each, and a last request,
    which has all padding rows. If n chunks draw a token, they get the last n of the `width` sampled
    rows. The other sampled rows are padding. In the buffers of `StepGraphs` the decodes' sampled
    rows follow the `width` rows, so the sampled rows of all drawn tokens are contiguous.

    Args:
        width: number of requests for chunks in the graph; at least `len(chunks)`.
        num_rows: number of rows of the graph, padding rows included.
        padding: slot of padding rows, which belongs to no request.
    """
    columns = [*map(_column, chunks)]
    left = num_rows - sum(chunk.num_tokens for chunk in chunks)
    columns += [(padding, 0, 0, 0)] * (width - len(columns)) + [(padding, 0, left, 0)]
    header = header_of(columns)
    samples = header[5, :-1] > 0
    header[4, np.concatenate((np.flatnonzero(~samples), np.flatnonzero(samples)))] = range(width)
    return header
