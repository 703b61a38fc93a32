"""What ranks that exchange sums and maxima check; every rank knows all parts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layers.kernels.ordered_sum import ordered_sum
from layers.kernels.peer import PeerExchange
from layers.kernels.rowwise import gain_rows
from tests.kernels.references import rms_norm_reference
from tests.rank_parts import random_parts, same_bits

_EPS = 1e-5


@dataclass
class PeerChecks:
    """One rank's calls, the same ones on every rank, of random shapes.

    Args:
        rows, width: as the exchange has them.
        cuts: whether floats are cut off to the dtype instead of rounded, as Triton's interpreter
            does for bf16.
    """

    exchange: PeerExchange
    rank: int
    size: int
    rows: int
    width: int
    dtype: torch.dtype
    device: torch.device
    cuts: bool = False

    def run(self, rounds: int, seed: int) -> None:
        """So many exchanges, for which ranks are early or late."""
        shared, own = (torch.Generator().manual_seed(s) for s in (seed, seed + self.rank + 1))
        for _ in range(rounds):
            time.sleep(0.02 * float(torch.rand((), generator=own)))
            check = self._check_max if torch.rand((), generator=shared) < 0.2 else self._check_sum
            check(shared)

    def _check_sum(self, source: torch.Generator) -> None:
        rows = int(torch.randint(1, self.rows + 1, (), generator=source))
        splits = 2 ** int(torch.randint(0, 3, (), generator=source))
        # On the devices, which draw the same: on the host it took most of the test's time.
        drawn = torch.Generator(self.device).manual_seed(
            int(torch.randint(2**62, (), generator=source))
        )
        about: dict[str, Any] = {"generator": drawn, "device": self.device}
        parts = random_parts((self.size, splits, rows, self.width), drawn)
        if splits == 1:
            parts = parts.to(self.dtype).float()
        x = parts[self.rank] if splits > 1 else parts[self.rank, 0].to(self.dtype)
        residual = torch.randn(rows, self.width, **about).to(self.dtype)
        weight = torch.rand(self.width, **about).to(self.dtype)
        rounded = torch.stack([ordered_sum(_tree(part)[None], self.dtype) for part in parts])
        summed = ordered_sum(rounded, self.dtype)
        assert same_bits(summed, self._summed(parts))
        assert self.exchange.takes_sum(x)
        if torch.rand((), generator=source) < 0.4:
            assert same_bits(self.exchange.all_reduce(x), summed)
            self._check_shots(x, summed)
            return
        normed, total, none = self.exchange.add_rms_norm(x, residual, weight, _EPS)
        assert none is None
        expected = ordered_sum(torch.stack((summed, residual)), self.dtype)
        assert same_bits(total, expected)
        finite = expected.isfinite().all(1)
        reference, _ = rms_norm_reference(expected, weight, _EPS)
        torch.testing.assert_close(normed[finite], reference[finite], rtol=2e-2, atol=2e-2)
        self._check_gain(x, residual, weight, expected)

    def _check_gain(self, x: Tensor, residual: Tensor, weight: Tensor, total: Tensor) -> None:
        """What the next product reads has the bits that it has if other kernels make it."""
        got = self.exchange.add_rms_norm(x, residual, weight, 0.0, gained=True)
        gained, squares, _ = gain_rows(total, weight)
        assert got[2] is not None
        for mine, expected in zip(got, (gained, total, squares), strict=True):
            assert mine is not None
            assert same_bits(mine, expected)

    def _check_shots(self, x: Tensor, summed: Tensor) -> None:
        """The same sum with one shot and with two shots, and of its first row alone."""
        before = self.exchange.two_shot_bytes
        for two_shot_bytes in (0, 1 << 40):
            self.exchange.two_shot_bytes = two_shot_bytes
            assert same_bits(self.exchange.all_reduce(x), summed)
            assert same_bits(self.exchange.all_reduce(x[..., :1, :]), summed[:1])
        self.exchange.two_shot_bytes = before

    def _check_max(self, source: torch.Generator) -> None:
        count = int(torch.randint(1, self.rows + 1, (), generator=source))
        info = torch.iinfo(torch.int64)
        x = torch.randint(info.min + 1, info.max, (self.size, count), generator=source)
        x = x.to(self.device)
        assert torch.equal(self.exchange.all_max(x[self.rank].contiguous()), x.amax(0)), "maximum"

    def _summed(self, parts: Tensor) -> Tensor:
        """The sum over ranks [T, width] of parts [ranks, S, T, width], by torch."""
        total = torch.zeros(parts.shape[2:], device=self.device)
        for part in parts:
            total += self._rounded(_tree(part)).float()
        return self._rounded(total)

    def _rounded(self, x: Tensor) -> Tensor:
        if self.cuts:
            x = (x.view(torch.int32) & -65536).view(torch.float32)
        return x.to(self.dtype)


def _tree(part: Tensor) -> Tensor:
    """The sum of the summands of a product, [S, T, width], in the order of its kernels."""
    while len(part) > 1:
        part = part[0::2] + part[1::2]
    return part[0]
