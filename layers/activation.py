"""The gated activation of the MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.kernels.launch import dependent_launch, fused


class SiluMul:
    """silu(gate) * up for x = [gate | up] (SwiGLU, Shazeer 2020)."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        self._fused = fused(device, dtype)
        self._pdl = self._fused and dependent_launch(device)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, 2n] -> [T, n]."""
        if self._fused:
            from layers.kernels.activation import silu_mul

            return silu_mul(x, pdl=self._pdl)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
