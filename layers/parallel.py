"""Where a layer is: its rank among several, dtype and device.

Layers are plain classes, since calls and parameters of `nn.Module`s cost 0.15 ms of a 2 ms step on
a CPU. A layer offers `weight_targets` for loading, `prepare` where something is to be done once the
weights are there, and `__call__`.
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
    """One rank's place in a tensor-parallel group: a group of one, subclassed by larger ones."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over the ranks; may reuse its storage."""
        return x

    def all_max(self, x: Tensor) -> Tensor:
        """Largest `x` of any rank, element by element, int64; may reuse its storage."""
        return x

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | None:
        """The sum over ranks with the residual add and norm that follow it, as one kernel.

        See `layers.kernels.rowwise.rms_norm` for `residual` with the part x. None if there is no
        such kernel for x; the caller then uses `all_reduce`.
        """
        del x, residual, weight, eps
        return None

    def rehearsal(self) -> AbstractContextManager[None]:
        """Within it collectives compile what they need, and neither communicate nor sum up."""
        return nullcontext()

    def per_rank(self, what: str, count: int) -> int:
        """This rank's part of `count` equal units, or ConfigError if they do not divide."""
        if count % self.size:
            raise ConfigError(
                "tensor_parallel_size",
                self.size,
                f"does not divide the model's {count} {what}",
                f"Use a divisor of {count}.",
            )
        return count // self.size

    def kv_heads(self, num_kv_heads: int) -> tuple[int, int]:
        """First KV head and number of them; where ranks outnumber them, heads are replicated."""
        if self.size > num_kv_heads and self.size % num_kv_heads == 0:
            return self.rank // (self.size // num_kv_heads), 1
        count = self.per_rank("KV heads", num_kv_heads)
        return self.rank * count, count


@dataclass(frozen=True)
class Place:
    """Where a layer is, as every layer's constructor receives it."""

    parallel: ParallelContext
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def fused(self) -> bool:
        """Whether the layers run the fused kernels of `layers.kernels`."""
        return fused(self.device, self.dtype)

    @cached_property
    def pdl(self) -> bool:
        """Whether those kernels may start before the one in front of them ends."""
        return self.fused and dependent_launch(self.device)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)
