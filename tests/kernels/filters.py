"""Rows of logits with filters of every kind, and what a kernel of logit bounds has to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from layers.kernels.logit_bounds import logit_bounds
from layers.logits import Filters, logit_bounds_reference

Bounds = Callable[[Tensor, Filters], Tensor]


def _choice(values: tuple[float, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    picks = torch.randint(len(values), (len(like),), generator=generator)
    return torch.tensor(values)[picks].to(like.device)


def random_filters(logits: Tensor, seed: int) -> Filters:
    """For each row one of everything, the absence of it included."""
    generator = torch.Generator().manual_seed(seed)
    return Filters(
        temperatures=_choice((0.0, 1e-45, 0.3, 1.0, 2.5), logits, generator),
        top_k=_choice((0, -1, 1, 2, 50, 10**6), logits, generator),
        top_p=_choice((1.0, 1e-9, 0.3, 0.9, 0.999), logits, generator),
        min_p=_choice((0.0, 1e-4, 0.2, 1.0), logits, generator),
    )


def hard_rows(vocab_size: int, dtype: torch.dtype) -> Tensor:
    """[12, vocab_size] rows that a guess from a few of their logits, or few bits, gets wrong."""
    generator = torch.Generator().manual_seed(vocab_size)
    noise = torch.randn(vocab_size, generator=generator)
    at = torch.arange(vocab_size)
    minus_inf = torch.full((vocab_size,), float("-inf"))
    rows = [
        torch.full((vocab_size,), -1.5),
        noise.sort(descending=True).values * 3,
        noise.sort().values,
        noise * 1e-3 + 100,
        noise.round(),
        torch.where(at % 2 == 0, 0.0, -0.0),
        # A hot token, a few of them in one place, and a few that are all there is.
        noise.index_fill(0, torch.tensor(vocab_size // 3), 60.0),
        torch.where(at // 9 == vocab_size // 18, noise + 12, noise),
        torch.where(at % 97 == 5, noise, minus_inf),
        minus_inf.index_fill(0, torch.tensor(vocab_size - 1), 2.0),
        # Between the tokens of any regular sample.
        torch.where(at % 64 == 63, 9.0, noise * 0.1),
        noise * 1e4,
    ]
    return torch.stack(rows).to(dtype)


def beside_top_p(rows: int, vocab_size: int, device: str = "cpu") -> tuple[Tensor, Filters]:
    """Rows, and filters with a top_p that the weight of some logits reaches but for rounding.

    If weights were added in float32, the order of the additions would decide whether it does.
    """
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocab_size, generator=generator).to(device)
    logits = (logits * 16).round().bfloat16() / 8
    ordered = logits.double().sort(dim=1, descending=True).values
    sums = ordered.softmax(1).cumsum(1)
    at = torch.linspace(0.1, 0.9, rows, device=device).unsqueeze(1)
    # The last of the equal logits with which the sum passes `at`.
    value = ordered.gather(1, (sums < at).sum(1, keepdim=True))
    top_p = sums.gather(1, (ordered >= value).sum(1, keepdim=True) - 1).squeeze(1).float()
    none = torch.zeros_like(top_p)
    return logits, Filters(none + 1, none.clone(), top_p, none)


def check_bounds(logits: Tensor, seed: int, kernel: Bounds = logit_bounds) -> None:
    """The kept distributions of kernel and reference agree; counted ones are the same sets."""
    check_filters(logits, random_filters(logits, seed), kernel)


# Sums of float32 over a row, in another order: seen up to 2e-7 apart for 4,096 logits, where the
# reference adds them one by one.
_SUMS = 2e-6


def check_filters(logits: Tensor, filters: Filters, kernel: Bounds) -> None:
    """As `check_bounds`, for given filters."""
    temperatures = torch.where(filters.temperatures > 1e-30, filters.temperatures, 1.0)

    def kept(least: Tensor) -> Tensor:
        rows = logits.float()
        return rows.masked_fill(rows < least.unsqueeze(1), float("-inf"))

    def wanted(more: float) -> Tensor:
        # At 1 and above nothing is summed.
        top_p = torch.where(filters.top_p >= 1, filters.top_p, filters.top_p + more)
        return kept(logit_bounds_reference(logits, replace(filters, top_p=top_p)))

    found, exact = kept(kernel(logits, filters)), wanted(0)
    scale = temperatures.unsqueeze(1)
    difference = ((found / scale).softmax(1) - (exact / scale).softmax(1)).abs().amax(1)
    number, most, fewest = (
        rows.isfinite().sum(1) for rows in (found, wanted(_SUMS), wanted(-_SUMS))
    )
    # Where a sum is next to p, either of two neighbours is right, however heavy.
    beside = (fewest <= number) & (number <= most)
    assert ((difference <= 1e-5) | beside).all()
    counted = filters.top_p >= 1
    assert torch.equal(found[counted], exact[counted])
    assert found.isfinite().any(1).all()
