"""Steps as CUDA graphs: one replay instead of some two hundred kernel launches.

Decodes and prefill chunks have separate graphs, with one graph for each of several row counts. A
step with decodes and chunks replays two graphs. (Graphs for mixed steps would be needed for every
pair of row counts.) Two graphs read the weights twice. As long as the prefill is short, the second
reading takes less time than launching the kernels one by one.
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

# Row counts of the captured prefill chunks. A step is padded to the next larger count; from 2,048
# rows on padding adds 6 % of the rows at most. Prefills above the last count run without a graph:
# the device then takes longer than the host's launches. For shorter prefills launching takes
# longer: a prefill of a few hundred tokens takes an H200 1 to 3 ms, and launching the kernels of 28
# layers takes the host some 10 ms.
CHUNK_ROWS = (*range(128, 1024, 128), *range(1024, 2048, 256), *range(2048, 4097, 128))
# Most prefill chunks in a captured step. With 32 instead of 8 the first token of a single prompt
# takes 0.01 to 0.12 ms longer. More than 32 were not tried.
MAX_CHUNKS = 32
# Launching the kernels of one layer takes the host of an H200 0.4 ms. `_BYTES_PER_SECOND` and
# `_FLOPS` are approximate rates at which an H200 reads weights and multiplies. From the constants
# `StepGraphs` estimates the longest prefill beside decodes for which two replays take less time
# than launching the kernels. The estimate was not checked by a measurement.
_LAUNCH_SECONDS = 0.4e-3
_BYTES_PER_SECOND = 4e12
_FLOPS = 600e12

# A function like `StepPass.plain`: enqueues a step for rows whose `StepRows.header` is set, returns
# the logits [R, this rank's vocabulary], and may write the logits into the tensor, if one is given.
PlainStep = Callable[[StepRows, "Tensor | None"], Tensor]


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of decodes that get a CUDA graph; a step is padded to the next larger number.

    The numbers double up to 8. Then they rise by 8 up to 64, by 16 up to 256, and by 32 from there
    to `max_num_seqs`. Padding adds next to no time to matrix products, and none to attention.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class StepGraphs:
    """The captured CUDA graphs of one runner.

    All graphs share two buffers: one for logits, and one for sampled rows, whose next token is
    drawn. In each buffer the first `MAX_CHUNKS` entries are for prefill chunks, and the rest for
    decodes. Chunks use the last of their entries, so that all used entries are contiguous.

    Args:
        step: enqueues the work that a graph captures.
        max_tokens: most rows that the prefill chunks of a step may have.
        weights_per_layer: number of weights, of 2 bytes each, in a layer on this rank (average).
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
        """Capture a graph for every number of rows; all rows are padding during the capture."""
        pool = None
        # Large graphs come first, so that smaller graphs fit into their memory pool. The graphs can
        # share the pool because no graph reads data that another graph left there.
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
        """Functions that enqueue the largest step of decodes, and of chunks, without a graph."""
        largest = partial(self._run, "decodes", self._decode_sizes[-1])
        return [largest, *(partial(self._run, "chunks", n) for n in self._chunk_sizes[-1:])]

    def rehearsals(self) -> list[Callable[[], object]]:
        """Functions that each enqueue a step without a graph; together they use all kernels."""
        # Every matrix product kernel serves one of these row counts, or the count of `heaviest`.
        sizes = [n for n in (1, 16, 24, 128, 256) if n < self._decode_sizes[-1]]
        return [*(partial(self._run, "decodes", n) for n in sizes), *self.heaviest()]

    def serves(self, plan: StepPlan) -> bool:
        """Whether the plan's rows fit the captured graphs."""
        if not plan.prefill or not self._graphs:
            return bool(self._graphs)
        most = max(self._chunk_sizes, default=0)
        if plan.decode:
            most = min(most, self._most_beside_decodes)
        return len(plan.prefill) <= MAX_CHUNKS and plan.num_prefill_tokens <= most

    def replay(self, plan: StepPlan) -> tuple[Tensor, SampledRows]:
        """Replay the graphs of a plan, which also draw its tokens and store them.

        `serves` must be true for the plan, and `DeviceState.apply` must have been called.

        Returns logits [R, this rank's vocabulary] and R sampled rows, valid until the next replay.
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
                slots = np.full(size, self._padding, dtype=np.int64)
                slots[: len(plan.decode)] = self._decode = plan.decode
                self._staging.upload(slots, out=self._decodes.header[0, :size])
            self._graphs["decodes", size].replay()
        num_chunks = sum(chunk.samples for chunk in plan.prefill)
        part = slice(MAX_CHUNKS - num_chunks, MAX_CHUNKS + len(plan.decode))
        return self._logits[part], self._sampled[part]

    def _run(self, kind: str, size: int, logits: Tensor | None = None) -> Tensor:
        """Enqueue a step of `size` rows, of "chunks" or "decodes"; put the logits into `logits`."""
        if kind == "chunks":
            rows, part = self._chunks.first_rows(size), slice(MAX_CHUNKS)
        else:
            rows, part = self._decodes.first_decodes(size), slice(MAX_CHUNKS, MAX_CHUNKS + size)
        out = None if logits is None else logits[part]
        made = self._step(rows, out)
        # A model may ignore `out` and return a tensor of its own.
        if out is not None and made is not out:
            out.copy_(made)
        return made


def captured(work: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    """Capture what `work` enqueues on the current stream; the graph's memory is from `pool`."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        work()
    return graph
