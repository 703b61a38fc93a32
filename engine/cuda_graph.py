"""Whole decode steps as CUDA graphs: one replay instead of some two hundred launches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, so that padding stays small and no size up to the last is missed.

    Doubling to 8, then steps of 8 to 64, of 16 to 256 and of 32 beyond. Padding rows cost the
    products next to nothing, and attention nothing.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """Captured decode steps for every batch size up to a maximum.

    Args:
        step: enqueues one decode step for the requests in a slots tensor [B] int64, and returns
            the sampled tokens [B]. Everything else it reads must stay where it is.
        slots: [max size] int64 static input, padded by the caller before a replay.
        sizes: rising batch sizes; the last one is the maximum.

    Attributes:
        pool: their memory, for graphs that run between them.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], slots: Tensor, sizes: list[int]) -> None:
        self._sizes = sizes
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = None
        # The largest first: the smaller ones then fit into its memory.
        for size in reversed(sizes):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                tokens = step(slots[:size])
            pool = graph.pool()
            self._graphs[size] = (graph, tokens)
        self.pool = pool

    def padded(self, size: int) -> int:
        """The captured size that serves `size` requests."""
        return self._sizes[bisect_left(self._sizes, size)]

    def replay(self, size: int) -> Tensor:
        """Enqueue the step for a captured `size`; its tokens [size], overwritten by the next."""
        graph, tokens = self._graphs[size]
        graph.replay()
        return tokens
