from __future__ import annotations

import torch

from layers.activation import silu_mul
from tests.layers.tensors import place


def test_silu_of_the_first_half_times_the_second() -> None:
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0)) * 5
    gate, up = x.double()[:, :12], x.double()[:, 12:]
    expected = gate / (1 + torch.exp(-gate)) * up
    out = silu_mul(x, place())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
