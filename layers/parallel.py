"""Where a layer runs (rank, dtype and device), and collectives of the tensor-parallel group.

Layers are not `nn.Module`s, whose calls and parameter access took 0.15 ms of a 2 ms step on a CPU.
A layer's `weight_targets` returns where to load its weights. `prepare` is called after loading.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from layers.kernels.launch import dependent_launch, fused
from utils.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """A rank and its collectives. This class is for a single rank, subclasses are for several."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of floats `x` over the ranks, with the bits of `ordered_sum`.

        So an element's sum depends on the ranks' values of this element alone, not on how many rows
        `x` has, or on how they are carried. The result may reuse the storage of `x`.
        """
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the values of `x` of all ranks, unchanged, in order of rank: [size, *x.shape]."""
        return x.unsqueeze(0)

    def all_max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum of int64 `x` over ranks; the result may overwrite `x`."""
        return x

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, gained: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Sum `x` over the ranks, add `residual`, and apply an RMS norm, all in one kernel.

        Returns the norm's output, the norm's input, which is the sum plus `residual`, and None. If
        `gained`, the output is a `Gained` stream instead, and its sums of squares are returned
        last. Returns None if no kernel supports `x`. Then the caller must use `all_reduce` and a
        norm.
        """
        del x, residual, weight, eps, gained
        return None

    def rehearsal(self) -> AbstractContextManager[None]:
        """Return a context manager in which collectives compile their kernels but send no data."""
        return nullcontext()

    def per_rank(self, what: str, count: int) -> int:
        """Return `count` / number of ranks. Raise a ConfigError if the division has a remainder."""
        if count % self.size:
            problem = f"does not divide the model's {count} {what}"
            fix = f"Use a divisor of {count}."
            raise ConfigError("tensor_parallel_size", self.size, problem, fix)
        return count // self.size

    def kv_heads(self, num_kv_heads: int) -> tuple[int, int]:
        """Return this rank's first KV head and number of KV heads. Ranks may share a KV head."""
        if self.size > num_kv_heads and self.size % num_kv_heads == 0:
            return self.rank // (self.size // num_kv_heads), 1
        count = self.per_rank("KV heads", num_kv_heads)
        return self.rank * count, count


@dataclass(frozen=True)
class Place:
    """The rank, dtype and device of a layer; constructors of all layers take a `Place`."""

    parallel: ParallelContext
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def fused(self) -> bool:
        """Whether the layer runs the fused kernels of `layers.kernels`."""
        return fused(self.device, self.dtype)

    @cached_property
    def pdl(self) -> bool:
        """Whether fused kernels may start before the preceding kernel ends (dependent launch)."""
        return self.fused and dependent_launch(self.device)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def ordered_sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of `parts` over their first dimension, rounded to `dtype`.

    The parts of each element are added in float32, in ascending order from +0, and the sum is
    rounded once. From +0, since an exchange through peer memory cannot send -0: a sum is never -0.
    NaN stays NaN, but which NaN is left open.
    """
    if fused(parts.device, dtype):
        from layers.kernels import ordered_sum as kernel

        return kernel.ordered_sum(parts, dtype)
    total = parts[0].float() + 0.0
    for part in parts[1:]:
        total += part
    return total.to(dtype)
