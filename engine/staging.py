"""Small host arrays on their way to the device, without stalling it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Staging:
    """Uploads a step's arrays through pinned memory, a few buffers taking turns.

    A copy from pinned memory returns at once and is read by the device later, so a buffer is
    written again only when the copies out of it are known to have ended.

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
            # A step has one or two groups of uploads, and two steps may be under way.
            self._buffers = [self._pinned(num_bytes) for _ in range(4)]
            self._read = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]

    @staticmethod
    def _pinned(num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def begin(self) -> None:
        """Start a group of uploads, on the current stream."""
        if self._cuda:
            self._turn = (self._turn + 1) % len(self._buffers)
            self._used = 0
            self._read[self._turn].synchronize()

    def upload(self, array: np.ndarray[Any, Any]) -> Tensor:
        """The array as a tensor on the device; the array itself must not be written any more."""
        source = torch.from_numpy(array)
        if not self._cuda:
            return source
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
        return pinned.to(self._device, non_blocking=True)

    def end(self) -> None:
        """All uploads of the group have been made."""
        if self._cuda:
            self._read[self._turn].record()
