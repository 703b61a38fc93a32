"""Prefix caching by chained digests."""

from __future__ import annotations

import xxhash

from config import Config
from engine.types import KVGeometry
from memory.cached_blocks import CachingBlockManager
from memory.eviction import CachedBlock


class PrefixCacheManager(CachingBlockManager):
    """Finds blocks by a 128-bit digest of the parent's digest and their tokens.

    The chain of digests is vLLM's idea (automatic prefix caching). The digest only says where
    to look: a hit must also have the very parent and the very tokens, so that neither a
    collision nor a block whose parent was given up is ever taken for another.
    """

    name = "prefix"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._table: dict[bytes, CachedBlock] = {}

    def find(self, parent: CachedBlock | str, tokens: bytes) -> CachedBlock | None:
        node = self._table.get(self.digest(parent, tokens))
        if node is None or node.parent != parent or node.tokens != tokens:
            return None
        return node

    def link(self, node: CachedBlock) -> CachedBlock | None:
        node.digest = self.digest(node.parent, node.tokens)
        displaced = self._table.get(node.digest)
        self._table[node.digest] = node
        return displaced

    def unlink(self, node: CachedBlock) -> None:
        del self._table[node.digest]

    @staticmethod
    def digest(parent: CachedBlock | str, tokens: bytes) -> bytes:
        """Where the block of `tokens` behind `parent` is looked up."""
        if isinstance(parent, str):
            return xxhash.xxh128_digest(parent.encode("utf-8", "surrogatepass") + tokens)
        return xxhash.xxh128_digest(parent.digest + tokens)
