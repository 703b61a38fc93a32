"""Block managers for sliding-window attention and for models with several cache groups."""

from __future__ import annotations

from typing import Any

import xxhash

from config import Config
from engine.types import NO_BLOCK, BlockManager, CacheStats, KVGeometry, PendingPrefix
from memory.block_manager import PagedBlockManager, PrefixCacheManager
from memory.eviction import CachedBlock
from memory.prefix_records import RequestRecord, WindowMatches, block_tokens
from utils.errors import ContractError


def held_blocks(geometry: KVGeometry, num_tokens: int, num_uncommitted: int) -> int:
    """Return how many blocks of a cache group a request of `num_tokens` tokens holds at most.

    `num_uncommitted` is the maximum number of positions that have blocks and are not committed.
    """
    size, kept = geometry.block_size, num_tokens - geometry.kind.first_read(num_tokens - 1)
    return min(-(-num_tokens // size), (kept + num_uncommitted + size - 2) // size + 1)


class WindowBlockManager(PagedBlockManager):
    """Frees a request's block when no later position attends to the block. Has no prefix cache.

    A request holds at most the blocks of its window and of the positions of the steps in flight. A
    longer prompt gets blocks only for its first positions. For each block that has left the window,
    `commit` adds a block to the end of the table, until the table has room for the whole prompt. So
    a request that has begun needs no further blocks for its prompt.
    """

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._geometry = geometry
        steps = (config.pipeline_depth or 0) + 1
        # `commit` is not called for each position, but for each filled block.
        self._num_uncommitted = self.block_size - 1 + steps * config.max_num_batched_tokens
        # Request id -> how many blocks at the start of the request's table have been freed.
        self._num_freed: dict[int, int] = {}
        self._num_places: dict[int, int] = {}  # request id -> length that `grow` asked for

    def most_blocks(self, num_tokens: int) -> int:
        # With fewer blocks than these, a request could not even compute one position at a time.
        least = held_blocks(self._geometry, num_tokens, 0)
        most = held_blocks(self._geometry, num_tokens, self._num_uncommitted)
        return max(least, min(most, self.num_blocks))

    def wanted(self, request_id: int, num_tokens: int) -> int:
        last = self._num_freed[request_id] + self.most_blocks(num_tokens)
        return min(super().wanted(request_id, num_tokens), last - len(self._tables[request_id]))

    def held(self, request_id: int) -> int:
        return len(self._tables[request_id]) - self._num_freed[request_id]

    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        self._num_freed[request_id] = self._num_places[request_id] = 0
        return super().begin(request_id, token_ids, cache_salt)

    def grow(self, request_id: int, num_tokens: int) -> bool:
        if not super().grow(request_id, num_tokens):
            return False
        self._num_places[request_id] = -(-num_tokens // self.block_size)
        return True

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """Free the request's blocks to which no position from `num_computed` on attends."""
        table, freed = self._tables[request_id], self._num_freed[request_id]
        first_read = self._first_block(num_computed)
        for place in range(freed, first_read):
            self._drop(table[place])
            table[place] = NO_BLOCK
            if len(table) < self._num_places[request_id]:
                table.append(self._take())
        self._num_freed[request_id] = max(freed, first_read)

    def release(self, request_id: int) -> None:
        del self._tables[request_id][: self._num_freed.pop(request_id)]
        del self._num_places[request_id]
        super().release(request_id)

    def _first_block(self, position: int) -> int:
        """Index of the first block to which `position` attends."""
        return self._geometry.kind.first_read(position) // self.block_size


class CachingWindowManager(WindowBlockManager, PrefixCacheManager):
    """Keeps the blocks that leave a window in a prefix cache, as long as no request needs them.

    A prefix of n tokens is found if all blocks are cached to which position n attends. Blocks
    before these may have been evicted. So a block is not found through the block before it, but by
    its tokens and a hash of all tokens before them, and the salt (vLLM's block hashes, Kwon et al.,
    SOSP 2023). Hits end at a block's end, and leave at least one token to compute.

    A request whose table has no room for its whole prompt yet shares no blocks: for a block that
    leaves the window, `commit` must be able to add another one, and a block that others hold does
    not become free. If the cache has fewer blocks than a request may hold, no blocks are shared.
    """

    _matches: WindowMatches

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        held = held_blocks(geometry, 2**62, self._num_uncommitted)
        self._shares = held <= self.num_blocks
        self._matches = WindowMatches(
            self.block_size, config.max_num_seqs + 1, "salt {}".format, _parent_of_next
        )

    def cached_tokens(self, token_ids: list[int], cache_salt: str, most: int) -> int:
        return self._longest(token_ids, cache_salt, most)[0]

    def _longest(
        self, token_ids: list[int], salt: str, most: int
    ) -> tuple[int, int, list[CachedBlock], str]:
        """Look up the longest cached prefix of at most `most` tokens.

        Returns its length, the index of its first block that the next position attends to, this
        block and all later blocks of the prefix, and the parent of the block after the prefix.
        """
        num_blocks = min(most, len(token_ids) - 1) // self.block_size
        if num_blocks <= 0 or not self._shares:
            return 0, 0, [], self._matches.first_parent(salt)
        match = self._matches.match(token_ids, salt, self.find_again)
        blocks, key = match.blocks, (num_blocks, len(token_ids))
        longest = match.longest.get(key)
        # A block that was lost since may only make the prefix shorter.
        if longest is None or any(node.block < 0 for node in self._read(blocks, longest)):
            longest = match.longest[key] = self._find_longest(blocks, *key)
        parent = blocks[longest].parent if longest < len(blocks) else match.next_parent
        hits, num_cached = self._read(blocks, longest), longest * self.block_size
        return num_cached, longest - len(hits), hits, str(parent)

    def _read(self, blocks: list[CachedBlock], num_blocks: int) -> list[CachedBlock]:
        """Return those of the first blocks to which the position after them attends."""
        return blocks[self._first_block(num_blocks * self.block_size) : num_blocks]

    def _find_longest(self, blocks: list[CachedBlock], num_blocks: int, num_tokens: int) -> int:
        """Return for how many of the first blocks all are cached that the next position reads."""
        # As many blocks at the start of the table no longer have a place.
        need = -(-num_tokens // self.block_size) - self.most_blocks(num_tokens)
        longest = first_cached = 0  # all blocks from `first_cached` on are cached
        for i in range(num_blocks):
            first = self._first_block((i + 1) * self.block_size)
            if blocks[i].block < 0:
                first_cached = i + 1
            elif max(first_cached, need) <= first:
                longest = i + 1
        return longest

    def fits(self, token_ids: list[int], cache_salt: str = "", most: int | None = None) -> bool:
        length = len(token_ids)
        found = self._longest(token_ids, cache_salt, length if most is None else most)
        num_cached, first, hits, _ = found
        num_places = min(-(-length // self.block_size), first + self.most_blocks(length))
        return self._finds_room(num_places - num_cached // self.block_size, hits)

    def begin(
        self, request_id: int, token_ids: list[int], cache_salt: str = "", most: int | None = None
    ) -> int:
        most = len(token_ids) if most is None else most
        num_cached, first, hits, parent = self._longest(token_ids, cache_salt, most)
        self._matches.forget(token_ids)
        table = [NO_BLOCK] * first + [node.block for node in hits]
        self._tables[request_id], self._num_places[request_id] = table, 0
        self._num_freed[request_id] = first
        for node in hits:
            if self._references[node.block] == 0:
                self._idle.remove(node)
            self._references[node.block] += 1
        self._requests[request_id] = RequestRecord(
            token_ids,
            cache_salt,
            last=parent,
            num_published=num_cached // self.block_size,
            hits=hits,
            num_cached=num_cached,
        )
        return num_cached

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        had_room = self._has_room(request_id)
        if not had_room:
            super().commit(request_id, token_ids, num_computed)
        request = self._requests[request_id]
        if self._has_room(request_id) and request.publishes and self._shares:
            self._publish_blocks(request, self._tables[request_id], token_ids, num_computed)
        if had_room:
            super().commit(request_id, token_ids, num_computed)

    def _has_room(self, request_id: int) -> bool:
        return len(self._tables[request_id]) >= self._num_places[request_id]

    def _publish_blocks(
        self, request: RequestRecord, table: list[int], token_ids: list[int], num_computed: int
    ) -> None:
        for i in range(request.num_published, num_computed // self.block_size):
            tokens, parent = block_tokens(token_ids, i, self.block_size), str(request.last)
            new = CachedBlock(table[i], parent, tokens)
            if table[i] != NO_BLOCK and self.find_again(new) is None:
                self._publish(new).depth = i
            request.last, request.num_published = _parent_of_next(parent, tokens), i + 1

    def _announce(self, request_id: int, request: RequestRecord) -> None:
        """Do nothing. So `pending` finds no prefix: it may be gone when it is computed."""


def _parent_of_next(parent: str, tokens: bytes) -> str:
    """Return a string for the tokens for which `parent` stands, followed by `tokens`."""
    return "hash " + xxhash.xxh128_hexdigest(parent.encode("utf-8", "surrogatepass") + tokens)


class GroupedBlockManager(BlockManager):
    """Combines the block managers of all cache groups. `grow` adds blocks in all groups or in none.

    The constructor raises a ContractError if the managers' block sizes differ.
    """

    groups: tuple[BlockManager, ...] = ()
    block_size = num_blocks = 0

    def __init__(self, managers: tuple[BlockManager, ...]) -> None:
        sizes = {blocks.block_size for blocks in managers}
        if len(sizes) != 1:
            raise ContractError(f"cache groups of different block sizes: {sorted(sizes)}")
        self.groups, self.block_size = managers, managers[0].block_size
        self.num_blocks = min(blocks.num_blocks for blocks in managers)

    @property
    def num_free_blocks(self) -> int:
        return min(blocks.num_free_blocks for blocks in self.groups)

    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        return max(blocks.begin(request_id, token_ids, cache_salt) for blocks in self.groups)

    def grow(self, request_id: int, num_tokens: int) -> bool:
        if any(b.wanted(request_id, num_tokens) > b.num_free_blocks for b in self.groups):
            return False
        for blocks in self.groups:
            if not blocks.grow(request_id, num_tokens):
                raise ContractError(f"{type(blocks).__name__} does not grow, and has free blocks")
        return True

    def table(self, request_id: int) -> list[int]:
        """The request's block table in the first group. `groups[i].table` is for group i."""
        return self.groups[0].table(request_id)

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        for blocks in self.groups:
            blocks.commit(request_id, token_ids, num_computed)

    def release(self, request_id: int) -> None:
        for blocks in self.groups:
            blocks.release(request_id)


class CachingGroups(GroupedBlockManager):
    """Uses a cached prefix if all groups have cached what the next position attends to.

    Each manager needs `cached_tokens` and the argument `most` of `begin`, as `CachingBlockManager`
    and `CachingWindowManager` have them. The constructor raises a ContractError without these.
    """

    caches_prefixes = True
    groups: tuple[Any, ...] = ()

    def __init__(self, managers: tuple[BlockManager, ...]) -> None:
        super().__init__(managers)
        for blocks in managers:
            if not blocks.caches_prefixes or not hasattr(blocks, "cached_tokens"):
                name = type(blocks).__name__
                raise ContractError(f"{name} cannot cache prefixes with several cache groups")

    @property
    def stats(self) -> CacheStats:
        """Tokens are counted once, blocks in each group."""
        first, *others = (blocks.stats for blocks in self.groups)
        evicted = first.evicted_blocks + sum(other.evicted_blocks for other in others)
        cached = first.cached_blocks + sum(other.cached_blocks for other in others)
        return CacheStats(first.queried_tokens, first.hit_tokens, evicted, cached)

    def begin(
        self, request_id: int, token_ids: list[int], cache_salt: str = "", most: int | None = None
    ) -> int:
        most = self._agreed(token_ids, cache_salt, most)
        for blocks in self.groups:
            blocks.begin(request_id, token_ids, cache_salt, most)
        return most

    def _agreed(self, token_ids: list[int], cache_salt: str, most: int | None) -> int:
        """Return the length of the longest prefix that all groups have cached, at most `most`."""
        # A hit that ends inside a block would need a copy of a block in each group.
        most = max(0, len(token_ids) - 1) if most is None else min(most, len(token_ids) - 1)
        most, found = most // self.block_size * self.block_size, -1
        while found != most:
            found = most
            for blocks in self.groups:
                most = blocks.cached_tokens(token_ids, cache_salt, most)
        return most

    def fits(self, token_ids: list[int], cache_salt: str = "", most: int | None = None) -> bool:
        most = self._agreed(token_ids, cache_salt, most)
        return all(blocks.fits(token_ids, cache_salt, most) for blocks in self.groups)

    def abandon(self, token_ids: list[int]) -> None:
        for blocks in self.groups:
            blocks.abandon(token_ids)

    def pending(
        self, token_ids: list[int], cache_salt: str = "", most: int | None = None
    ) -> PendingPrefix | None:
        found = (blocks.pending(token_ids, cache_salt, most) for blocks in self.groups)
        return next(filter(None, found), None)

    def reset_prefix_cache(self) -> None:
        for blocks in self.groups:
            blocks.reset_prefix_cache()


def grouped(managers: tuple[BlockManager, ...]) -> BlockManager:
    """Return the only manager, or one that combines all managers."""
    if len(managers) == 1:
        return managers[0]
    caches = any(blocks.caches_prefixes for blocks in managers)
    return CachingGroups(managers) if caches else GroupedBlockManager(managers)
