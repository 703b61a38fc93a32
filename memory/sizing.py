"""Measures the GPU memory that weights and steps take, and counts the KV blocks that still fit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from engine.types import KVGeometry
from utils.errors import OutOfMemoryError

# Bytes left free for what `measure_usage` does not measure: the CUDA driver's memory for some 70
# captured graphs of a few hundred nodes each, and the rounding up of allocations.
_MARGIN_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Usage:
    """Measured memory of a GPU, in bytes."""

    total: int  # memory of the device
    free_before: int  # free memory before this engine allocated any memory
    weights: int  # memory that the weights and the runner's per-request tables take
    peak: int  # additional memory that torch's allocator needs to run steps


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn out-of-memory errors of torch and NumPy into an error that names options to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # If a CPU has too little memory, torch raises a RuntimeError with the words "allocate
        # memory". Other errors contain "memory" too, e.g. "illegal memory access" of CUDA.
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        full = full or "allocate memory" in str(error)
        if not full or isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(
            f"{device} cannot hold the model, its steps and tables: {error}. Lower "
            "max_num_batched_tokens, max_num_seqs or max_model_len, or raise tensor_parallel_size."
        ) from error


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU in bytes; return 0 if the device is a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def release_device(device: torch.device) -> None:
    """Return to the CUDA driver all memory that torch reserves but no tensor uses."""
    if device.type == "cuda":
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def measure_usage(
    device: torch.device, free_before: int, steps: list[Callable[[], object]]
) -> Usage:
    """Measure the GPU memory in use, and the additional memory that each call in `steps` takes."""
    torch.cuda.synchronize(device)
    peak = 0  # sum of the peaks of all `steps`, since eager steps and CUDA graphs share no memory
    weights = free_before - free_bytes(device)
    for step in steps:
        torch.cuda.empty_cache()
        start = torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peak += torch.cuda.max_memory_reserved(device) - start
    return Usage(torch.cuda.mem_get_info(device)[1], free_before, weights, peak)


def fit_blocks(utilization: float, geometry: KVGeometry, usage: Usage) -> KVGeometry:
    """Return a copy of `geometry` with the number of KV blocks that fit besides weights and steps.

    The engine may take at most a fraction `utilization` of the GPU's memory, and at most
    `usage.free_before` bytes. Raises an OutOfMemoryError if not even one block fits.
    """
    allowed = min(int(utilization * usage.total), usage.free_before)
    left = allowed - usage.weights - usage.peak - _MARGIN_BYTES
    count, gib = left // geometry.bytes_per_block, 2**30
    if count < 1:
        raise OutOfMemoryError(
            f"no memory is left for the KV cache: of {usage.total / gib:.2f} GiB, "
            f"{usage.free_before / gib:.2f} were free and gpu_memory_utilization={utilization} "
            f"allows {allowed / gib:.2f}; weights take {usage.weights / gib:.2f}, activations "
            f"{usage.peak / gib:.2f}, and a block {geometry.bytes_per_block / gib:.4f}. Raise "
            "gpu_memory_utilization, or lower max_num_batched_tokens or max_num_seqs."
        )
    return replace(geometry, num_blocks=count)
