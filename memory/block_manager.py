"""Paged KV blocks with reference counts."""

from __future__ import annotations

from config import Config
from engine.types import BlockManager, KVGeometry


class PagedBlockManager(BlockManager):
    """Hands out blocks from a free list; every request owns its blocks alone.

    Paging of the KV cache is from vLLM (Kwon et al., SOSP 2023). `config` is not used.
    """

    name = "paged"
    block_size = num_blocks = 0

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        self.block_size, self.num_blocks = geometry.block_size, geometry.num_blocks
        # A stack, lowest id on top: recently used blocks come back first.
        self._free = list(range(geometry.num_blocks - 1, -1, -1))
        self._references = [0] * geometry.num_blocks
        self._tables: dict[int, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        assert request_id not in self._tables, "begin() of a request that has begun"
        self._tables[request_id] = []
        return 0

    def grow(self, request_id: int, num_tokens: int) -> bool:
        table = self._tables[request_id]
        wanted = -(-num_tokens // self.block_size) - len(table)
        if wanted > self.num_free_blocks:
            return False
        for _ in range(wanted):
            table.append(self._take_new())
        return True

    def table(self, request_id: int) -> list[int]:
        return self._tables[request_id]

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """Nothing to publish without prefix caching."""

    def release(self, request_id: int) -> None:
        for block in reversed(self._tables.pop(request_id)):
            self._drop(block)

    def _take_new(self) -> int:
        """A free block, of which there is one, with its first reference."""
        block = self._take()
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        """Give up a reference."""
        assert self._references[block] > 0, "release of a free block"
        self._references[block] -= 1
        if self._references[block] == 0:
            self._give(block)

    def _take(self) -> int:
        """A block that nobody holds; there is one."""
        return self._free.pop()

    def _give(self, block: int) -> None:
        """The last reference to a block is gone."""
        self._free.append(block)
