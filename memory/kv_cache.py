"""The tensor that holds the KV of a cache group, and its views for each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.types import KVGeometry
from memory.huge_pages import zeros
from utils.errors import OutOfMemoryError


@dataclass(frozen=True, slots=True)
class KVLayer:
    """The KV cache of one layer, in several views of the same memory.

    Attributes:
        k, v: keys and values, each [num_blocks, block_size, num_kv_heads, head_dim].
        flat: keys and values in one view, [num_blocks * block_size, 2 * num_kv_heads, head_dim].
            At each position all heads of K come before all heads of V.
        keys, values: K and V, heads first: [1, num_kv_heads, num_blocks * block_size, head_dim].
    """

    k: Tensor
    v: Tensor
    flat: Tensor
    keys: Tensor
    values: Tensor

    @staticmethod
    def of(pages: Tensor) -> KVLayer:
        """Return the views of a layer's KV [num_blocks, block_size, 2, num_kv_heads, head_dim]."""
        flat = pages.view(-1, 2 * pages.shape[3], pages.shape[4])
        keys, values = flat.transpose(0, 1).unsqueeze(0).chunk(2, dim=1)
        return KVLayer(pages[:, :, 0], pages[:, :, 1], flat, keys, values)


class KVCache:
    """KV of a cache group in `data` [layers, num_blocks, block_size, 2, num_kv_heads, head_dim].

    In `data` the V of a position follows its K, so that one indexed write can store both. The
    constructor raises an OutOfMemoryError if the device cannot hold the cache.
    """

    def __init__(self, geometry: KVGeometry, dtype: torch.dtype, device: torch.device) -> None:
        g = geometry
        shape = (g.num_layers, g.num_blocks, g.block_size, 2, g.num_kv_heads, g.head_dim)
        try:
            self.data = zeros(shape, dtype, device)
        except RuntimeError as error:
            raise OutOfMemoryError(
                f"the KV cache needs {g.num_blocks} blocks of {g.bytes_per_block} bytes, "
                f"{g.num_blocks * g.bytes_per_block / 2**30:.2f} GiB, and {device} cannot hold "
                "them. Lower num_kvcache_blocks, kvcache_memory_bytes or gpu_memory_utilization."
            ) from error

    def copy_block(self, source: int, target: int) -> None:
        """Copy block `source` to block `target` in all layers, on the current CUDA stream."""
        self.data[:, target] = self.data[:, source]

    def layers(self) -> list[KVLayer]:
        return [KVLayer.of(pages) for pages in self.data]
