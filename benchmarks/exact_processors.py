"""Logits processors of the workload `exact`, in a module that the processes of ranks can import.

The engine calls a logits processor with the logits of the row whose token is drawn next. So a
processor sees these logits without a change in the engine, also in the process of a rank.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class HashLogits:
    """Writes a hash of each row of logits it gets into a file, and changes nothing.

    Not a list in memory: a rank's processor is a copy in another process.

    Attributes:
        folder: folder of the files; there is one for each request and process.
        index: number of the request.
    """

    folder: str
    index: int

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        # Opened anew each time, because the process of a rank ends without closing files.
        with (Path(self.folder) / f"{self.index}-{os.getpid()}").open("a") as file:
            file.write(f"{len(token_ids)} {hash_of(logits)}\n")
        return logits


def hashes_of(folder: str, index: int) -> tuple[str, ...]:
    """The hashes that `HashLogits` has written for a request: one text, or more if ranks differ."""
    return tuple(sorted({file.read_text() for file in Path(folder).glob(f"{index}-*")}))


def hash_of(logits: Tensor) -> int:
    """A hash of the bits of float32 `logits` [vocabulary].

    It is the sum of all elements' bits, each multiplied by a random odd number, modulo 2^64. Rows
    that differ in one element have different hashes. Rows that differ in more have the same hash
    once in 2^32 at worst. The sum of integers is exact in any order, so the device computes it, and
    only one number is copied to the host.
    """
    bits = logits.view(torch.int32).long()
    return int((bits * _factors(len(bits), logits.device)).sum())


@lru_cache
def _factors(count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, dtype=torch.int64)
    return (numbers | 1).to(device)


def flatten(token_ids: list[int], logits: Tensor) -> Tensor:
    """A processor that changes all logits."""
    return logits / 2


def break_logits(token_ids: list[int], logits: Tensor) -> Tensor:
    """A processor after which all logits are NaN."""
    return logits.fill_(float("nan"))
