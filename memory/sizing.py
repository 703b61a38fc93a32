"""Counts the KV blocks of each cache group; on a GPU, measures what memory is left for them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from config import Config
from engine.types import (
    BlockUpdate,
    FullPages,
    KVGeometry,
    NewRequest,
    PrefillChunk,
    StepPlan,
    WindowPages,
)
from memory.cache_groups import held_blocks
from sampling_params import SamplingParams
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
    """Turn out-of-memory errors of torch and NumPy into an OutOfMemoryError that names options."""
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


def longest_prefill(config: Config, groups: tuple[KVGeometry, ...]) -> StepPlan:
    """Return a step of prompts of max_model_len - 1 tokens, or max_num_batched_tokens if fewer.

    Each block table lists all blocks of its group.
    """
    assert config.max_model_len is not None
    longest = min(config.max_model_len - 1, config.max_num_batched_tokens)
    count = min(config.max_num_seqs, max(1, config.max_num_batched_tokens // longest))
    params = SamplingParams()
    return StepPlan(
        step_id=0,
        new_requests=tuple(NewRequest(s, s, (0,) * longest, params, 0) for s in range(count)),
        block_updates=_all_blocks(count, groups),
        prefill=tuple(PrefillChunk(slot, 0, longest, True) for slot in range(count)),
    )


def heaviest_steps(
    run: Callable[[StepPlan], object],
    config: Config,
    groups: tuple[KVGeometry, ...],
    positions: torch.Tensor,
    captured: Sequence[Callable[[], object]],
) -> list[Callable[[], object]]:
    """Return functions that run large steps, among them the step that needs the most memory.

    Args:
        run: runs a step.
        positions: position of the next decode in each slot, int64 [slots + 1], in the runner's
            tables.
        captured: functions that run the largest steps that are captured as CUDA graphs.
    """

    def longest() -> None:
        run(longest_prefill(config, groups))
        if not captured:
            assert config.max_model_len is not None
            # The requests do not enter slots, so the positions of their decodes are set here. Each
            # decode draws the last token of a request.
            positions[:-1] = config.max_model_len - 2
            run(longest_decodes(config, groups))

    return [longest, *captured]


def longest_decodes(config: Config, groups: tuple[KVGeometry, ...]) -> StepPlan:
    """Return a step of max_num_seqs decodes, whose block tables list all blocks of each group."""
    slots = tuple(range(config.max_num_seqs))
    return StepPlan(step_id=0, block_updates=_all_blocks(len(slots), groups), decode=slots)


def _all_blocks(num_slots: int, groups: tuple[KVGeometry, ...]) -> tuple[BlockUpdate, ...]:
    # In falling order: what finds neighbouring blocks in place takes less memory.
    return tuple(
        BlockUpdate(slot, 0, tuple(reversed(range(group.num_blocks))), index)
        for slot in range(num_slots)
        for index, group in enumerate(groups)
    )


def cache_groups(
    layer_groups: tuple[int, ...],
    windows: tuple[int | None, ...],
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype_bytes: int,
) -> tuple[KVGeometry, ...]:
    """Return the cache groups of one rank, with one block each.

    Args:
        layer_groups: index of each layer's cache group.
        windows: the sliding window of each cache group; None for full attention.
        num_kv_heads, head_dim, block_size, dtype_bytes: see `KVGeometry`.
    """
    sizes = num_kv_heads, head_dim, block_size, 1, dtype_bytes
    return tuple(
        KVGeometry(layer_groups.count(i), *sizes, WindowPages(w) if w else FullPages())
        for i, w in enumerate(windows)
    )


def fit_blocks(
    config: Config, groups: tuple[KVGeometry, ...], usage: Usage
) -> tuple[KVGeometry, ...]:
    """Return copies of `groups` with the KV blocks that fit besides weights and steps.

    The engine may take at most a fraction gpu_memory_utilization of the GPU's memory, and at most
    `usage.free_before` bytes. Raises an OutOfMemoryError if not even one block fits.
    """
    utilization, gib = config.gpu_memory_utilization, 2**30
    allowed = min(int(utilization * usage.total), usage.free_before)
    left = allowed - usage.weights - usage.peak - _MARGIN_BYTES
    counts = _shares(left, groups, _most_blocks(config, groups))
    if min(counts) < 1:
        block = sum(group.bytes_per_block for group in groups)
        raise OutOfMemoryError(
            f"no memory is left for the KV cache: of {usage.total / gib:.2f} GiB, "
            f"{usage.free_before / gib:.2f} were free and gpu_memory_utilization={utilization} "
            f"allows {allowed / gib:.2f}; weights take {usage.weights / gib:.2f}, activations "
            f"{usage.peak / gib:.2f}, and a block {block / gib:.4f}. Raise "
            "gpu_memory_utilization, or lower max_num_batched_tokens or max_num_seqs."
        )
    return _with_counts(groups, counts)


def kv_blocks(config: Config, groups: tuple[KVGeometry, ...]) -> tuple[KVGeometry, ...]:
    """Return copies of `groups` with the numbers of KV blocks computed from `config`.

    num_kvcache_blocks is the number for the group that needs the most blocks. If it is None,
    kvcache_memory_bytes bounds the cache. If both options are None, the cache has blocks for
    max_num_seqs requests of max_model_len tokens, but takes at most 1 GiB. Raises an
    OutOfMemoryError if not even one block of each group fits in the allowed memory.
    """
    most = _most_blocks(config, groups)
    if config.num_kvcache_blocks is not None:
        counts = [-(-config.num_kvcache_blocks * count // max(most)) for count in most]
        return _with_counts(groups, counts)
    budget = config.kvcache_memory_bytes
    num_bytes = 2**30 if budget is None else budget
    counts = _shares(num_bytes, groups, most)
    if min(counts) < 1:
        raise OutOfMemoryError(
            f"a KV cache of {num_bytes} bytes holds no block: one of {groups[0].block_size} tokens "
            f"takes {sum(group.bytes_per_block for group in groups)}. Raise kvcache_memory_bytes, "
            "or lower kvcache_block_size."
        )
    if budget is None:
        counts = list(map(min, counts, most))
    return _with_counts(groups, counts)


def _most_blocks(config: Config, groups: tuple[KVGeometry, ...]) -> list[int]:
    """Return for each group how many blocks max_num_seqs requests of max_model_len tokens hold.

    All of them decode, besides prefill chunks of max_num_batched_tokens tokens in each step.
    """
    length, steps = config.max_model_len, (config.pipeline_depth or 0) + 1
    assert length is not None
    most = []
    for group in groups:
        size, whole = group.block_size, -(-length // group.block_size) * config.max_num_seqs
        lag = size - 1 + steps * (1 + config.num_speculative_tokens)
        chunks = -(-steps * config.max_num_batched_tokens // size)
        most.append(min(whole, held_blocks(group, length, lag) * config.max_num_seqs + chunks))
    return most


def _shares(num_bytes: int, groups: tuple[KVGeometry, ...], most: list[int]) -> list[int]:
    """Divide memory among groups, so that each can hold the same fraction of its `most` blocks."""
    total = sum(g.bytes_per_block * count for g, count in zip(groups, most, strict=True))
    return [num_bytes * count // total for count in most]


def _with_counts(groups: tuple[KVGeometry, ...], counts: list[int]) -> tuple[KVGeometry, ...]:
    return tuple(replace(g, num_blocks=n) for g, n in zip(groups, counts, strict=True))
