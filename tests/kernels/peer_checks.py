"""What ranks that exchange sums and maxima check; every rank knows all parts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from layers.kernels.peer import PeerExchange
from tests.kernels.references import (
    rms_norm_reference,
)

_EPS = 1e-5


@dataclass
class PeerChecks:
    """One rank's calls, the same ones on every rank, of random shapes.

    Args:
        rows, width: as the exchange has them.
        exact: whether sums must agree to the bit.
    """

    exchange: PeerExchange
    rank: int
    size: int
    rows: int
    width: int
    dtype: torch.dtype
    device: torch.device
    exact: bool

    def run(self, rounds: int, seed: int) -> None:
        """So many exchanges, for which ranks are early or late."""
        shared, own = (torch.Generator().manual_seed(s) for s in (seed, seed + self.rank + 1))
        for _ in range(rounds):
            time.sleep(0.02 * float(torch.rand((), generator=own)))
            check = self._check_max if torch.rand((), generator=shared) < 0.2 else self._check_sum
            check(shared)

    def _check_sum(self, source: torch.Generator) -> None:
        rows = int(torch.randint(1, self.rows + 1, (), generator=source))
        splits = int(torch.randint(1, 4, (), generator=source))
        # On the devices, which draw the same: on the host it took most of the test's time.
        drawn = torch.Generator(self.device).manual_seed(
            int(torch.randint(2**62, (), generator=source))
        )
        about: dict[str, Any] = {"generator": drawn, "device": self.device}
        parts = torch.randn(self.size, splits, rows, self.width, **about)
        # Zeros of both signs, and numbers that become zero when they are rounded.
        parts *= torch.randint(0, 2, parts.shape, **about)
        parts *= torch.where(torch.rand(parts.shape, **about) < 0.1, 1e-30, 1.0)
        if splits == 1:
            parts = parts.to(self.dtype).float()
        x = parts[self.rank] if splits > 1 else parts[self.rank, 0].to(self.dtype)
        residual = torch.randn(rows, self.width, **about).to(self.dtype)
        weight = torch.rand(self.width, **about).to(self.dtype)
        summed = self._summed(parts)
        assert self.exchange.takes_sum(x)
        if torch.rand((), generator=source) < 0.4:
            self._compare(self.exchange.all_reduce(x), summed.to(self.dtype))
            return
        normed, total = self.exchange.add_rms_norm(x, residual, weight, _EPS)
        expected = (summed + residual.float()).to(self.dtype)
        self._compare(total, expected)
        reference, _ = rms_norm_reference(expected, weight, _EPS)
        torch.testing.assert_close(normed, reference, rtol=2e-2, atol=2e-2)

    def _check_max(self, source: torch.Generator) -> None:
        count = int(torch.randint(1, self.rows + 1, (), generator=source))
        info = torch.iinfo(torch.int64)
        x = torch.randint(info.min + 1, info.max, (self.size, count), generator=source)
        x = x.to(self.device)
        assert torch.equal(self.exchange.all_max(x[self.rank].contiguous()), x.amax(0)), "maximum"

    def _summed(self, parts: Tensor) -> Tensor:
        """The sum over ranks [T, width] float32 of parts [ranks, S, T, width]."""
        total = torch.zeros(parts.shape[2:], device=self.device)
        for part in parts:
            # In the kernel's order, for the same bits.
            total += reduce(torch.add, part).to(self.dtype).float()
        two_shot = self.exchange.two_shot(parts.shape[2])
        return total.to(self.dtype).float() if two_shot else total

    def _compare(self, got: Tensor, expected: Tensor) -> None:
        if self.exact:
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.1)
