"""Compiles the kernels of a model's steps in several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from layers.parallel import ParallelContext


def compile_kernels(
    groups: list[list[Callable[[], object]]], device: torch.device, parallel: ParallelContext
) -> None:
    """Run functions that launch steps without requests, each group in a thread of its own."""

    def run(steps: list[Callable[[], object]]) -> None:
        # In a new thread the current CUDA device is device 0, which may belong to another rank.
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(stream):
            for step in steps:
                step()
            stream.synchronize()

    torch.cuda.synchronize(device)
    # All threads write to the same tensors, but nothing reads the results. In `rehearsal()`
    # collectives send no data. If they sent data, ranks could wait for each other for ever,
    # since the threads of two ranks reach the collectives in different orders.
    with parallel.rehearsal(), ThreadPoolExecutor(len(groups), "compile") as threads:
        list(threads.map(run, groups))
