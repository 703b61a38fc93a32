"""Rows of logits with filters of every kind, and what the threshold kernel has to find in them."""

from __future__ import annotations

import torch
from torch import Tensor

from layers.kernels.thresholds import thresholds
from layers.logits import Filters, thresholds_reference


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


def check_thresholds(logits: Tensor, seed: int) -> None:
    """The kept distributions of kernel and reference agree; counted ones are the same sets."""
    filters = random_filters(logits, seed)
    temperatures = torch.where(filters.temperatures > 1e-30, filters.temperatures, 1.0)

    def kept(least: Tensor) -> Tensor:
        rows = logits.float()
        return rows.masked_fill(rows < least.unsqueeze(1), float("-inf"))

    found, wanted = kept(thresholds(logits, filters)), kept(thresholds_reference(logits, filters))
    scale = temperatures.unsqueeze(1)
    difference = ((found / scale).softmax(1) - (wanted / scale).softmax(1)).abs()
    # Where a sum of float32 is next to p, either of two neighbours is right.
    assert difference.max() <= 1e-5
    counted = filters.top_p >= 1
    assert torch.equal(found[counted], wanted[counted])
    assert found.isfinite().any(1).all()
