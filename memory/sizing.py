"""How large the KV cache may be on a CUDA device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from engine.types import KVGeometry
from utils.errors import OutOfMemoryError

# For what the driver takes beside the pool for captured graphs (some 70 of them with a few hundred
# nodes each) and for allocations to round up; tests/gpu checks that the whole stays within 2 %.
_MARGIN_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Usage:
    """Device memory in bytes."""

    total: int  # of the device
    free_before: int  # before this engine took any; what others hold is not in it
    weights: int  # taken by this engine and kept
    peak: int  # taken on top by its heaviest steps, all kept for reuse


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """An OutOfMemoryError with the way out, where torch or NumPy run out of memory within."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # A CPU's allocator has no type of its own. "illegal memory access" is something else.
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        full = full or "allocate memory" in str(error)
        if not full or isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(
            f"{device} cannot hold the model, its steps and tables: {error}. Lower "
            "max_num_batched_tokens, max_num_seqs or max_model_len, or raise tensor_parallel_size."
        ) from error


def free_bytes(device: torch.device) -> int:
    """Free device memory; 0 for a CPU, whose caches are sized otherwise."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def release_device(device: torch.device) -> None:
    """Give cached device memory back, as far as nothing refers to it."""
    if device.type == "cuda":
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def measure_usage(
    device: torch.device, free_before: int, steps: list[Callable[[], object]]
) -> Usage:
    """What the heaviest steps take: the sum, as eager steps and the graphs' pool share nothing."""
    torch.cuda.synchronize(device)
    peak = 0
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
    """`geometry` with as many blocks as fit beside weights and activations.

    The whole engine stays below `utilization` of the device and below what was free before it.

    Raises:
        OutOfMemoryError: not one block fits; the message has the numbers.
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
