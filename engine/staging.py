"""Small host arrays on their way to the device, without stalling it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Two steps may be under way while a third one is prepared.
_NUM_BUFFERS = 3


class Staging:
    """Uploads a step's arrays through pinned memory, a few buffers taking turns.

    A copy from pinned memory returns at once, and the device reads the memory later. So a buffer
    is written again only when the copies out of it are known to have ended.

    Args:
        device: where to. On a CPU arrays are wrapped in place.
        num_bytes: first size of a buffer; it grows when a step brings more.
    """

    def __init__(self, device: torch.device, num_bytes: int = 1 << 20) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._turn = 0
        self._used = 0
        if self._cuda:
            self._buffers = [self._pinned(num_bytes) for _ in range(_NUM_BUFFERS)]
            self._read = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]

    @staticmethod
    def _pinned(num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    @contextmanager
    def group(self) -> Iterator[None]:
        """The uploads of one step, on the current stream."""
        if not self._cuda:
            yield
            return
        self._turn = (self._turn + 1) % len(self._buffers)
        self._used = 0
        self._read[self._turn].synchronize()
        try:
            yield
        finally:
            self._read[self._turn].record()

    def upload(self, array: np.ndarray[Any, Any], out: Tensor | None = None) -> Tensor:
        """The array as a tensor on the device; the array itself must not be written any more.

        Args:
            out: where to put it, of the same shape and type; made when absent.
        """
        source = torch.from_numpy(array)
        if not self._cuda:
            return source if out is None else out.copy_(source)
        size = array.nbytes
        buffer = self._buffers[self._turn]
        if self._used + size > buffer.numel():
            # Copies from the old buffer may be under way; torch's pinned allocator keeps the
            # memory back until they end.
            buffer = self._buffers[self._turn] = self._pinned(2 * (self._used + size))
            self._used = 0
        pinned = buffer[self._used : self._used + size].view(source.dtype).view(source.shape)
        pinned.copy_(source)
        # Every array starts on a multiple of 16 bytes, whatever its type.
        self._used += -(-size // 16) * 16
        if out is not None:
            return out.copy_(pinned, non_blocking=True)
        return pinned.to(self._device, non_blocking=True)
