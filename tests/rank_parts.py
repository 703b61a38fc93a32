"""Parts of ranks whose sum shows in which order they were added, and where it was rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What a part may hold beside ordinary numbers. Where ranks differ, infinities make NaN.
_SPECIAL = torch.tensor([-0.0, float("inf"), -float("inf"), float("nan"), 60_000.0, 6e-8])


def random_parts(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Parts of ranks, float32 [ranks, ...], whose sum depends on the order of the ranks."""
    about: dict[str, Any] = {"generator": source, "device": source.device}
    parts = torch.randn(shape, **about)
    # Zeros of both signs, and numbers that become zero when they are rounded.
    parts *= torch.randint(0, 2, shape, **about)
    parts *= torch.where(torch.rand(shape, **about) < 0.1, 1e-30, 1.0)
    # Numbers of many sizes, which often cancel: else any order would give the same 16 bits.
    parts *= 2.0 ** torch.randint(-14, 14, shape, **about)
    cancel = torch.rand(shape[1:], **about) < 0.3
    parts[-1] = torch.where(cancel, -parts[0], parts[-1])
    special = _SPECIAL.to(source.device)[torch.randint(0, len(_SPECIAL), shape, **about)]
    return torch.where(torch.rand(shape, **about) < 0.02, special, parts)


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same bits, but for which NaN a NaN is."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    integers = {2: torch.int16, 4: torch.int32}[got.element_size()]
    bits = [torch.where(x.isnan(), 0, x.contiguous().view(integers)) for x in (got, expected)]
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(*bits)
