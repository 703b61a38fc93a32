"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.parallel import WeightSlot, frozen


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed and returned in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, optionally after adding x to the residual."""

    def __init__(
        self, hidden_size: int, eps: float, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = frozen(torch.empty(hidden_size, dtype=dtype, device=device))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, hidden] -> (normalised x + residual, x + residual)."""
        total = x if residual is None else x + residual
        return rms_normalize(total, self.eps).to(x.dtype) * self.weight, total

    def weight_slots(self, name: str) -> dict[str, WeightSlot]:
        """Slot of the checkpoint's tensor `name`.weight."""
        return {f"{name}.weight": WeightSlot(self.weight.data, tuple(self.weight.shape))}
