"""Captures steps as CUDA graphs. One replay of a graph replaces some two hundred kernel launches.

In this file a row of a step is one input token. The R sampled rows are those whose next token is
drawn. There are graphs for decodes and graphs for prefill chunks, with fixed numbers of rows.
Padding rows fill up smaller steps. A step with decodes and prefill chunks replays two graphs. If
one graph ran both, every pair of row counts would need a graph. Two graphs read the weights twice,
but for a short prefill two replays take less time than launching all kernels one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.device_state import DeviceState, chunks_header, header_of
from engine.hidden_rows import Forwarded
from engine.types import StepPlan
from layers.step_rows import SampledRows, StepRows

# Row counts of the prefill graphs. Padding rows fill up a prefill to the next larger count; above
# 2,048 rows padding adds at most 6 % to the rows. A prefill of a few hundred tokens takes an H200 1
# to 3 ms, but the host needs some 10 ms to launch the kernels of a model with 28 layers. A prefill
# of more rows than the largest count uses no graph: its kernels take longer than their launches.
CHUNK_ROWS = (*range(128, 1024, 128), *range(1024, 2048, 256), *range(2048, 4097, 128))
# Maximum number of prefill chunks in a graph. On an H200, graphs for 32 chunks take 0.01 to 0.12 ms
# longer to replay than graphs for 8 chunks. Graphs for more than 32 chunks were not tried.
MAX_CHUNKS = 32
# `_LAUNCH_SECONDS` is the host's time to launch the kernels of one layer. `_BYTES_PER_SECOND` and
# `_FLOPS` are an H200's approximate memory and compute rates. From these constants `StepGraphs`
# estimates how many prefill tokens a step with decodes may have so that two replays are faster than
# launching all kernels one by one. No measurement has checked the estimate.
_LAUNCH_SECONDS = 0.4e-3
_BYTES_PER_SECOND = 4e12
_FLOPS = 600e12

T = TypeVar("T")
# Type of `StepPass.plain`, which enqueues a step and returns logits [R, this rank's vocabulary] and
# states. Arguments: a `StepRows` with a filled `header`, and a tensor for the logits, or None.
PlainStep = Callable[[StepRows, "Tensor | None"], tuple[Tensor, Tensor]]


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Return the numbers of decodes for which CUDA graphs are captured.

    The numbers double up to 8, rise by 8 up to 64, by 16 up to 256, then by 32 to `max_num_seqs`.
    Padding decodes fill up a step to the next larger number, which hardly slows the step.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class StepGraphs:
    """The captured CUDA graphs of one runner.

    All graphs share a buffer for logits and a `SampledRows`, each with one entry per sampled row.
    The first `MAX_CHUNKS` entries are for prefill chunks, and all later entries for decodes. If n
    chunks draw a token, they use the last n of the `MAX_CHUNKS` entries. So the entries of all
    tokens that a step draws are contiguous.

    Args:
        step: function that enqueues the kernels of a step, which are captured as a graph.
        max_tokens: maximum number of prefill tokens in a step.
        weights_per_layer: number of the model's weights (2 bytes each) / (layers * ranks).
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
        most, groups = max(self._chunk_sizes, default=0), len(state.tables.block_tables)
        self._chunks = StepRows.empty(
            torch.from_numpy(chunks_header((), MAX_CHUNKS, most, self._padding)).to(device),
            most,
            self._sampled[:MAX_CHUNKS],
            groups,
            num_chunks=MAX_CHUNKS,
        )
        self._decodes = StepRows.empty(
            torch.from_numpy(header_of([(self._padding, -1, 1, 1)] * max_num_seqs)).to(device),
            max_num_seqs,
            self._sampled[MAX_CHUNKS:],
            groups,
        )
        self._decode: tuple[int, ...] = ()
        self._logits: Tensor | None = None
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._states: dict[tuple[str, int], Tensor] = {}  # last states of each graph's sampled rows

    def capture(self) -> None:
        """Capture all graphs, with steps whose rows are all padding."""
        for run in self.heaviest():
            # A first run may allocate memory for all later runs. It must not be a graph's memory.
            logits, _ = run()
        pool, shape = None, (len(self._sampled.rows), logits.shape[1])
        self._logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
        # The graphs may share a memory pool, since no graph reads what another graph wrote to it.
        # Large graphs are captured first, so that small graphs fit in the pool's memory.
        steps = [("decodes", size) for size in self._decode_sizes]
        steps += [("chunks", size) for size in self._chunk_sizes]
        for kind, size in reversed(steps):
            if kind == "chunks":
                self._chunks.header.copy_(self._padded(size))
            # No other graph may use the memory of states while the tensor exists.
            work = partial(self._run, kind, size, self._logits)
            graph, (_, self._states[kind, size]) = captured(work, pool)
            self._graphs[kind, size], pool = graph, graph.pool()

    def heaviest(self) -> list[Callable[[], tuple[Tensor, Tensor]]]:
        """Return functions that launch the kernels of the largest decode and prefill graphs."""
        largest = partial(self._run, "decodes", self._decode_sizes[-1])
        return [largest, *(partial(self._run, "chunks", n) for n in self._chunk_sizes[-1:])]

    def rehearsals(self) -> list[Callable[[], object]]:
        """Return functions that together launch nearly all kernels of the graphs.

        They may run at the same time, before `capture`. What they write is of padding rows.
        """
        # The kernels of products depend on the row count. Of the 162 kernels that five models need,
        # these row counts use all but 2. Others compile in `capture`, 0.5 to 0.9 s for each.
        most = self._decode_sizes[-1]
        decodes = sorted({min(n, most) for n in (1, 16, 24, 40, 80, 208, 288)})
        chunks = (n for n in self._chunk_sizes if n in (768, 1536, 2176, 3712))
        padded = (replace(self._chunks.first_rows(n), header=self._padded(n)) for n in chunks)
        steps = [*padded, *(self._decodes.first_decodes(n) for n in decodes)]
        return [partial(self._step, rows, None) for rows in steps]

    def _padded(self, size: int) -> Tensor:
        """Return the header of a step of `size` padding rows in place of chunks."""
        header = chunks_header((), MAX_CHUNKS, size, self._padding)
        return torch.from_numpy(header).to(self._chunks.header.device)

    def serves(self, plan: StepPlan) -> bool:
        """Return whether there are graphs for the plan, so that `replay(plan)` may be called."""
        if not plan.prefill or not self._graphs:
            return bool(self._graphs)
        most = max(self._chunk_sizes, default=0)
        if plan.decode:
            most = min(most, self._most_beside_decodes)
        return len(plan.prefill) <= MAX_CHUNKS and plan.num_prefill_tokens <= most

    def replay(self, plan: StepPlan) -> tuple[Forwarded, SampledRows]:
        """Replay the graphs for a plan. The graphs compute logits, draw tokens and store tokens.

        `serves(plan)` must be True, and `DeviceState.apply(plan)` must have been called. The next
        replay overwrites what is returned.
        """
        assert self._logits is not None
        num_chunks, states = sum(chunk.samples for chunk in plan.prefill), []
        if plan.prefill:
            size = self._chunk_sizes[bisect_left(self._chunk_sizes, plan.num_prefill_tokens)]
            header = chunks_header(plan.prefill, MAX_CHUNKS, size, self._padding)
            self._staging.upload(header, out=self._chunks.header)
            self._graphs["chunks", size].replay()
            states.append(self._states["chunks", size][MAX_CHUNKS - num_chunks :])
        if plan.decode:
            size = self._decode_sizes[bisect_left(self._decode_sizes, len(plan.decode))]
            if plan.decode != self._decode:
                slots = np.full(size, self._padding, dtype=np.int64)
                slots[: len(plan.decode)] = self._decode = plan.decode
                self._staging.upload(slots, out=self._decodes.header[0, :size])
            self._graphs["decodes", size].replay()
            states.append(self._states["decodes", size][: len(plan.decode)])
        part = slice(MAX_CHUNKS - num_chunks, MAX_CHUNKS + len(plan.decode))
        return Forwarded(self._logits[part], states), self._sampled[part]

    def _run(self, kind: str, size: int, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Enqueue a step of `size` rows. Return logits, in the tensor `logits` if given, states."""
        if kind == "chunks":
            rows, part = self._chunks.first_rows(size), slice(MAX_CHUNKS)
        else:
            rows, part = self._decodes.first_decodes(size), slice(MAX_CHUNKS, MAX_CHUNKS + size)
        out = None if logits is None else logits[part]
        made, states = self._step(rows, out)
        # The model may ignore `out` and return the logits in a new tensor.
        if out is not None and made is not out:
            out.copy_(made)
        return made, states


def captured(work: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """Return a CUDA graph of the work that `work` enqueues, and its result. `pool`: memory pool."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # In other modes than "relaxed", kernels that are not loaded yet cannot be captured.
    with torch.cuda.graph(graph, pool, torch.cuda.current_stream(), "relaxed"):
        made = work()
    return graph, made
