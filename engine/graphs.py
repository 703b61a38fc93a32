"""Steps as CUDA graphs: one replay instead of some two hundred kernel launches.

There is a graph for each of some row counts of two kinds of step, decodes and prefill chunks. A
step with both replays a graph of each, since one for both would be needed for every pair of row
counts. Such a step reads the weights twice, which costs less than launching its kernels one by one
as long as the prefill is short.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.device_state import DeviceState, chunks_header, header_of
from engine.types import StepPlan
from layers.step_rows import SampledRows, StepRows

# Row counts of prefill chunks to capture. A step is padded to the next one, by 6 % at most from
# 2,048 on, where the padding costs more than a launch. Beyond the last the device is the slower
# side. Below it launching takes longer: a prefill of a few hundred tokens takes an H200 1 to 3 ms,
# and launching its kernels the host some 10 ms for 28 layers.
CHUNK_ROWS = (*range(128, 1024, 128), *range(1024, 2048, 256), *range(2048, 4097, 128))
# Chunks of a captured step. 32 instead of 8 cost a lone prompt 0.01 to 0.12 ms; more were not
# tried.
MAX_CHUNKS = 32
# Launching the kernels of a layer takes an H200's host 0.4 ms. The other two are about the rates at
# which the device reads weights and multiplies. From these follows the prefill from which on two
# replays take longer than launching; it was not measured.
_LAUNCH_SECONDS = 0.4e-3
_BYTES_PER_SECOND = 4e12
_FLOPS = 600e12

# Enqueues a whole step of greedy or plainly drawn tokens for rows that have their header. Returns
# the logits [R, columns], best in the given tensor.
PlainStep = Callable[[StepRows, "Tensor | None"], Tensor]


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of decodes to capture, so that padding stays small and none up to the last is missed.

    Doubling to 8, then steps of 8 to 64, of 16 to 256 and of 32 beyond. Padding rows cost the
    matrix products next to nothing, and attention nothing.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class StepGraphs:
    """The captured steps of one runner.

    All of them put logits and sampled rows into the same buffers: those of up to `MAX_CHUNKS`
    chunks, then those of the decodes. The chunks' samples are the last ones of their part, so that
    what a plan samples is one stretch of the buffers, whatever its kind.

    Args:
        step: what is captured.
        state: the tables that the rows are made from.
        max_tokens: most rows that the chunks of a step may have at all.
        weights_per_layer: of a rank, on average, in elements of 2 bytes.
    """

    def __init__(
        self, step: PlainStep, state: DeviceState, max_tokens: int, weights_per_layer: int
    ) -> None:
        self._step = step
        self._staging = state.staging
        self._padding = state.tables.padding_slot
        device, max_num_seqs = state.tables.tokens.device, self._padding
        self._decode_sizes = decode_sizes(max_num_seqs)
        self._chunk_sizes = [size for size in CHUNK_ROWS if size <= max_tokens]
        once_more = 2 * weights_per_layer / _BYTES_PER_SECOND
        a_token = 2 * weights_per_layer / _FLOPS
        self._most_beside_decodes = int((_LAUNCH_SECONDS - once_more) / a_token)
        self._sampled = SampledRows.empty(MAX_CHUNKS + max_num_seqs, device)
        most = max(self._chunk_sizes, default=0)
        self._chunks = StepRows.empty(
            torch.from_numpy(chunks_header((), MAX_CHUNKS, most, self._padding)).to(device),
            most,
            self._sampled[:MAX_CHUNKS],
            num_chunks=MAX_CHUNKS,
        )
        self._decodes = StepRows.empty(
            torch.from_numpy(header_of([(self._padding, -1, 1, 1)] * max_num_seqs)).to(device),
            max_num_seqs,
            self._sampled[MAX_CHUNKS:],
        )
        self._decode: tuple[int, ...] = ()
        self._logits: Tensor | None = None
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}

    def capture(self) -> None:
        """Capture every step, of padding alone."""
        pool = None
        # The largest first: the smaller ones then fit into its memory. No graph needs what another
        # one left there.
        steps = [("decodes", size) for size in self._decode_sizes]
        steps += [("chunks", size) for size in self._chunk_sizes]
        for kind, size in reversed(steps):
            if kind == "chunks":
                header = chunks_header((), MAX_CHUNKS, size, self._padding)
                self._chunks.header.copy_(torch.from_numpy(header))
            logits = self._run(kind, size)
            if self._logits is None:
                shape = (len(self._sampled.rows), logits.shape[1])
                self._logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
            self._graphs[kind, size] = captured(partial(self._run, kind, size, self._logits), pool)
            pool = self._graphs[kind, size].pool()

    def heaviest(self) -> list[Callable[[], object]]:
        """What enqueues the largest step of each kind, of padding and uncaptured."""
        largest = partial(self._run, "decodes", self._decode_sizes[-1])
        return [largest, *(partial(self._run, "chunks", n) for n in self._chunk_sizes[-1:])]

    def rehearsals(self) -> list[Callable[[], object]]:
        """What enqueues steps of padding that between them need all kernels, uncaptured."""
        # One number of rows for each kind of matrix product, and the largest.
        sizes = [n for n in (1, 16, 24, 128, 256) if n < self._decode_sizes[-1]]
        return [*(partial(self._run, "decodes", n) for n in sizes), *self.heaviest()]

    def serves(self, plan: StepPlan) -> bool:
        """Whether the plan's rows run as graphs."""
        if not plan.prefill or not self._graphs:
            return bool(self._graphs)
        most = max(self._chunk_sizes, default=0)
        if plan.decode:
            most = min(most, self._most_beside_decodes)
        return len(plan.prefill) <= MAX_CHUNKS and plan.num_prefill_tokens <= most

    def replay(self, plan: StepPlan) -> tuple[Tensor, SampledRows]:
        """Enqueue a plan that is served, its changes being taken in; draws and writes its tokens.

        Returns:
            Logits [R, columns] and sampled rows with their tokens; the next replay overwrites both.
        """
        assert self._logits is not None
        if plan.prefill:
            size = self._chunk_sizes[bisect_left(self._chunk_sizes, plan.num_prefill_tokens)]
            header = chunks_header(plan.prefill, MAX_CHUNKS, size, self._padding)
            self._staging.upload(header, out=self._chunks.header)
            self._graphs["chunks", size].replay()
        if plan.decode:
            size = self._decode_sizes[bisect_left(self._decode_sizes, len(plan.decode))]
            if plan.decode != self._decode:
                # Most steps decode the same requests as the one before.
                slots = np.full(size, self._padding, dtype=np.int64)
                slots[: len(plan.decode)] = self._decode = plan.decode
                self._staging.upload(slots, out=self._decodes.header[0, :size])
            self._graphs["decodes", size].replay()
        num_chunks = sum(chunk.samples for chunk in plan.prefill)
        part = slice(MAX_CHUNKS - num_chunks, MAX_CHUNKS + len(plan.decode))
        return self._logits[part], self._sampled[part]

    def _run(self, kind: str, size: int, logits: Tensor | None = None) -> Tensor:
        """Enqueue the step of a size for the headers as they are.

        Args:
            logits: the buffer for those of all steps.
        """
        if kind == "chunks":
            rows, part = self._chunks.first_rows(size), slice(MAX_CHUNKS)
        else:
            rows, part = self._decodes.first_decodes(size), slice(MAX_CHUNKS, MAX_CHUNKS + size)
        out = None if logits is None else logits[part]
        made = self._step(rows, out)
        # A model need not have put them there.
        if out is not None and made is not out:
            out.copy_(made)
        return made


def captured(work: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    """A graph of what `work` enqueues on the current stream; `pool` is the memory to share."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        work()
    return graph
