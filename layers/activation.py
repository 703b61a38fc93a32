"""The gated activation of the MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from layers.parallel import Place


def silu_mul(x: Tensor, place: Place) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020) of x = [gate | up]: [T, 2n] -> [T, n]."""
    if place.fused:
        from layers.kernels import activation

        return activation.silu_mul(x, pdl=place.pdl)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
