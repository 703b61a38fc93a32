"""Prefix caching by a radix tree."""

from __future__ import annotations

from config import Config
from engine.types import KVGeometry
from memory.cached_blocks import CachingBlockManager
from memory.eviction import CachedBlock


class RadixCacheManager(CachingBlockManager):
    """Finds blocks in a tree over tokens, one tree for each cache salt.

    The tree is SGLang's idea (RadixAttention, Zheng et al., NeurIPS 2024). Here every edge is
    the tokens of one block: shorter ones cannot be shared between block tables, and longer ones
    would have to be split where prompts part. No digests, and so no collisions.
    """

    name = "radix"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._children: dict[CachedBlock | str, dict[bytes, CachedBlock]] = {}

    def find(self, parent: CachedBlock | str, tokens: bytes) -> CachedBlock | None:
        children = self._children.get(parent)
        return children.get(tokens) if children else None

    def link(self, node: CachedBlock) -> None:
        self._children.setdefault(node.parent, {})[node.tokens] = node

    def unlink(self, node: CachedBlock) -> None:
        siblings = self._children[node.parent]
        del siblings[node.tokens]
        if not siblings:
            del self._children[node.parent]
