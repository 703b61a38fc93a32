"""Compiles the kernels of a model's steps in several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from layers.parallel import ParallelContext

# Threads that run steps, and wait for kernels most of the time; threads that compile kernels. Other
# numbers of threads were not tried.
_STEPS, _COMPILERS = 12, 8


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels and load them into the device's memory."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(_loaded, partial(fn, *args, **kwargs))


def _loaded(compile_kernel: Callable[[], Any]) -> Any:
    kernel = compile_kernel()
    # Reading `run` loads the kernel. Two threads that load a kernel when they first launch the
    # kernel disturb each other: one of them may launch before the other one has loaded.
    _ = kernel.run
    return kernel


def compile_kernels(
    steps: list[Callable[[], object]], device: torch.device, parallel: ParallelContext
) -> None:
    """Run functions that launch steps without requests, in several threads.

    A kernel that several steps launch is compiled once, and all these steps wait for the kernel.
    """
    from triton import AsyncCompileMode
    from triton.runtime.cache import triton_key

    # A digest of Triton's files, which Triton computes once. If 12 threads began to compute the
    # digest at the same time, an H200's host needed 0.3 s longer.
    triton_key()

    def run(step: Callable[[], object]) -> None:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(stream):
            step()
            stream.synchronize()

    torch.cuda.synchronize(device)
    # In a new thread the current CUDA device is device 0, which may belong to another rank.
    here = partial(torch.cuda.set_device, device)
    with _Compilers(_COMPILERS, "compile", initializer=here) as compilers:
        mode = AsyncCompileMode(compilers)

        def begin() -> None:
            here()
            mode.__enter__()  # a context variable: each thread has a value of its own

        # All threads write to the same tensors, but nothing reads the results. In `rehearsal()`
        # collectives send no data. If they sent data, ranks could wait for each other for ever,
        # since the threads of two ranks reach the collectives in different orders.
        with parallel.rehearsal(), ThreadPoolExecutor(_STEPS, "step", initializer=begin) as threads:
            list(threads.map(run, steps))
