"""Three block managers: `paged` shares no blocks; `prefix` and `radix` share cached blocks.

`prefix` and `radix` keep full blocks in a *prefix cache*. A new request that begins with the tokens
of cached blocks uses these blocks and does not compute their tokens again. A block's *parent* is
the cached block right before it in the request. The parent of a request's first block is the cache
salt, a string: requests share blocks only if their salts are equal. Two blocks are *equal* if their
tokens and their parents are equal. The *index* finds a cached block by its parent and its tokens. A
request *holds* the blocks in its block table. A cached block that no request holds is *idle*. If a
request needs a block and none is free, an idle block is *evicted*: removed from the prefix cache.
"""

from __future__ import annotations

from abc import abstractmethod

import xxhash

from config import Config
from engine.types import BlockCopy, BlockManager, CacheStats, KVGeometry, PendingPrefix
from memory.eviction import CachedBlock, EvictionPolicy
from memory.prefix_records import Key, PrefixMatch, PrefixMatches, RequestRecord, block_tokens
from utils.registry import PartKind


class PagedBlockManager(BlockManager):
    """Gives a request free blocks that no other request uses (vLLM, Kwon et al., SOSP 2023)."""

    name = "paged"
    block_size = num_blocks = 0

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        self.block_size, self.num_blocks = geometry.block_size, geometry.num_blocks
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
        wanted = self.wanted(request_id, num_tokens)
        if wanted > self.num_free_blocks:
            return False
        for _ in range(wanted):
            table.append(self._take())
        return True

    def held(self, request_id: int) -> int:
        return len(self._tables[request_id])

    def table(self, request_id: int) -> list[int]:
        return self._tables[request_id]

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """Do nothing: this manager shares no blocks with later requests."""

    def release(self, request_id: int) -> None:
        for block in reversed(self._tables.pop(request_id)):
            self._drop(block)

    def _take(self) -> int:
        """Take a block from `_free`, which must not be empty, and set its reference count to 1."""
        block = self._free.pop()
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        """Lower a block's reference count by 1. At count 0 the block becomes free or idle."""
        assert self._references[block] > 0, "release of a free block"
        self._references[block] -= 1
        if self._references[block] == 0:
            self._give(block)

    def _give(self, block: int) -> None:
        self._free.append(block)


class CachingBlockManager(PagedBlockManager):
    """Shares full blocks between requests that have equal cache salts and equal first tokens.

    `commit` adds a request's full blocks to the prefix cache, except blocks that equal a cached
    block. Subclasses implement the index of cached blocks with `find`, `link` and `unlink`.
    """

    caches_prefixes = True

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        kind = PartKind("eviction_policy", "memory.eviction:EvictionPolicy", ("memory",))
        self._idle: EvictionPolicy = kind.make(config.eviction_policy, config, geometry)
        self._cached: dict[int, CachedBlock] = {}
        self._requests: dict[int, RequestRecord] = {}
        self._pending: dict[Key, int] = {}  # key of a block -> id of the request that computes it
        # Request id -> copy that `take_copies` will return. Until then the source is not evicted.
        self._copies: dict[int, BlockCopy] = {}
        # The requests that may look for admission in a step: those deferred, and the queue's first.
        self._matches = PrefixMatches(self.block_size, config.max_num_seqs + 1)
        self._queried_tokens = self._hit_tokens = self._evicted_blocks = 0

    @abstractmethod
    def find(self, parent: CachedBlock | str, tokens: bytes) -> CachedBlock | None:
        """Return the cached block with these `tokens` (int32 bytes) and this `parent`, or None."""

    def find_again(self, sought: CachedBlock) -> CachedBlock | None:
        """Return the cached block with the parent and the tokens of `sought`, or None.

        Called any number of times for one `sought`, in which a subclass may keep its digest.
        """
        return self.find(sought.parent, sought.tokens)

    @abstractmethod
    def link(self, node: CachedBlock) -> CachedBlock | None:
        """Add `node` to the index. If `node` replaces a block in the index, return that block."""

    @abstractmethod
    def unlink(self, node: CachedBlock) -> None:
        """Remove `node` from the index. `find` may then miss blocks whose parent is `node`."""

    @property
    def num_free_blocks(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def stats(self) -> CacheStats:
        counts = self._queried_tokens, self._hit_tokens, self._evicted_blocks
        return CacheStats(*counts, len(self._cached))

    def cached_tokens(self, token_ids: list[int], cache_salt: str, most: int) -> int:
        """Return the length of the longest cached prefix, at most `most`."""
        return min(most, self._match(token_ids, cache_salt).num_hits * self.block_size)

    def fits(self, token_ids: list[int], cache_salt: str = "", most: int | None = None) -> bool:
        match, length = self._match(token_ids, cache_salt), len(token_ids)
        # The block of the last token is never shared: see `_give_up_last`.
        most_hits = max(0, length - 1 if most is None else most) // self.block_size
        hits = match.blocks[: min(match.num_hits, most_hits)]
        return self._finds_room(-(-length // self.block_size) - len(hits), hits)

    def _finds_room(self, num_new: int, hits: list[CachedBlock]) -> bool:
        """Whether `num_new` blocks would be free or idle if a request held `hits`."""
        left = self.num_free_blocks - num_new
        if not 0 <= left < len(hits):
            return left >= 0
        return sum(self._references[node.block] == 0 for node in hits) <= left

    def abandon(self, token_ids: list[int]) -> None:
        self._matches.forget(token_ids)

    def begin(
        self, request_id: int, token_ids: list[int], cache_salt: str = "", most: int | None = None
    ) -> int:
        """Do what the contract says, with at most `most` cached tokens, which fill blocks."""
        super().begin(request_id, token_ids, cache_salt)
        match = self._match(token_ids, cache_salt)
        num_hits = len(token_ids) if most is None else most // self.block_size
        hits = match.blocks[: min(match.num_hits, num_hits)]
        self._matches.forget(token_ids)
        for node in hits:
            if self._references[node.block] == 0:
                self._idle.remove(node)
            self._references[node.block] += 1
            self._tables[request_id].append(node.block)
        num_cached = len(hits) * self.block_size
        if hits and num_cached == len(token_ids):
            num_cached -= self._give_up_last(request_id, hits)
        num_shared = num_cached // self.block_size
        last = hits[num_shared - 1] if num_shared else cache_salt
        self._requests[request_id] = RequestRecord(
            token_ids, cache_salt, last, num_shared, hits, num_cached
        )
        return num_cached

    def grow(self, request_id: int, num_tokens: int) -> bool:
        if not super().grow(request_id, num_tokens):
            return False
        request = self._requests[request_id]
        if request.hits is not None:
            # Hits are counted only here, because `begin` is called again later if `grow` fails.
            for node in request.hits:
                node.hits += 1
            request.hits = None
            self._queried_tokens += len(request.tokens)
            self._hit_tokens += request.num_cached
            self._announce(request_id, request)
        return True

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        request = self._requests[request_id]
        if not request.publishes:
            return
        self._withdraw(request)
        if any(twin.block < 0 for twin in request.twins):
            # A twin was evicted (its `block` is -1), so `find` cannot find the blocks after the
            # twin. Start at the first block again: the request's own block replaces the twin.
            request.last, request.num_published, request.twins = request.salt, 0, []
        table = self._tables[request_id]
        for i in range(request.num_published, num_computed // self.block_size):
            tokens = block_tokens(token_ids, i, self.block_size)
            new = CachedBlock(table[i], request.last, tokens)
            node = self.find_again(new)
            if node is None:
                node = self._publish(new)
            elif node.block != table[i]:
                request.twins.append(node)
            request.last, request.num_published = node, i + 1
        self._announce(request_id, request)

    def release(self, request_id: int) -> None:
        if copy := self._copies.pop(request_id, None):
            self._drop(copy.source)
        super().release(request_id)
        self._withdraw(self._requests.pop(request_id))

    def take_copies(self) -> tuple[BlockCopy, ...]:
        copies = tuple(self._copies.values())
        self._copies.clear()
        for copy in copies:
            # From now on the source block may be given to another request. The next step copies the
            # block, and the other request writes to the block only in a later step.
            self._drop(copy.source)
        return copies

    def pending(
        self, token_ids: list[int], cache_salt: str = "", most: int | None = None
    ) -> PendingPrefix | None:
        if not self._pending:
            return None
        match = self._match(token_ids, cache_salt)
        limit = len(token_ids) if most is None else min(most, len(token_ids))
        size, end = self.block_size, (match.num_hits + 1) * self.block_size
        if end > limit:
            return None
        sought = match.blocks[match.num_hits]
        if (request_id := self._pending.get((sought.parent, sought.tokens))) is None:
            return None
        leader = self._requests[request_id]
        if match.leader is leader:
            end = max(end, min(match.num_shared, limit // size * size))
        theirs = leader.tokens
        while (last := end + size) <= limit and token_ids[end:last] == theirs[end:last]:
            end = last
        match.leader, match.num_shared = leader, end
        return PendingPrefix(request_id, end)

    def reset_prefix_cache(self) -> None:
        for node in list(self._cached.values()):
            self.unlink(node)
            self._forget(node)
        self._pending.clear()
        self._matches.clear()
        for request in self._requests.values():
            request.publishes, request.next_block = False, None

    def _give_up_last(self, request_id: int, hits: list[CachedBlock]) -> int:
        """Replace the last block in the block table of a request whose tokens are all cached.

        Sampling needs the logits of the last token. Computing these logits writes the KV of the
        last token, but a cached block must not be written, because requests may share it. So the
        block table gets a new block, to which the next step copies the cached block. If no block is
        free or idle, or if block_size is 1, the cached block is only removed from the table.
        Returns how many tokens to compute: 1 after a copy, otherwise all tokens of the block.
        """
        table = self._tables[request_id]
        source = table.pop()
        if self.block_size > 1 and self.num_free_blocks:
            table.append(self._take())
            self._copies[request_id] = BlockCopy(source, table[-1])
            return 1
        hits.pop()
        self._drop(source)
        return self.block_size

    def _match(self, token_ids: list[int], salt: str) -> PrefixMatch:
        """Return the blocks of the longest prefix of `token_ids` that is in the prefix cache."""
        return self._matches.match(token_ids, salt, self.find_again)

    def _publish(self, node: CachedBlock) -> CachedBlock:
        if stale := self._cached.get(node.block):
            # An earlier `commit` cached this block as `stale`. One of the blocks before it was
            # a twin and has been evicted since, so `find` cannot find `stale` any more.
            self.unlink(stale)
            self._forget(stale)
        if displaced := self.link(node):
            self._forget(displaced)
        self._cached[node.block] = node
        self._matches.publish(node)
        return node

    def _announce(self, request_id: int, request: RequestRecord) -> None:
        """Add to `_pending` the block that a request fills next, if the block's tokens are known.

        Through `pending` the scheduler finds out which requests should wait for this block.
        """
        if len(request.tokens) >= (request.num_published + 1) * self.block_size:
            tokens = block_tokens(request.tokens, request.num_published, self.block_size)
            key = request.last, tokens
            if self._pending.setdefault(key, request_id) == request_id:
                request.next_block = key

    def _withdraw(self, request: RequestRecord) -> None:
        if request.next_block is not None:
            self._pending.pop(request.next_block, None)
            request.next_block = None

    def _take(self) -> int:
        if not self._free:
            node = self._idle.pop()
            self.unlink(node)
            self._free.append(node.block)
            del self._cached[node.block]
            node.block = -1
            self._evicted_blocks += 1
            self._matches.num_lost += 1
        return super()._take()

    def _give(self, block: int) -> None:
        if node := self._cached.get(block):
            self._idle.add(node)
        else:
            self._free.append(block)

    def _forget(self, node: CachedBlock) -> None:
        """Remove from the cache a block that has left the index. Free it if no request holds it."""
        del self._cached[node.block]
        if self._references[node.block] == 0:
            self._idle.remove(node)
            self._free.append(node.block)
        node.block = -1
        self._matches.num_lost += 1


class PrefixCacheManager(CachingBlockManager):
    """Finds cached blocks by a 128-bit digest, as vLLM does.

    A block's digest is a hash of its parent's digest and its tokens. `find` also compares parent
    and tokens, so `find` never returns a wrong block whose digest happens to be equal.
    """

    name = "prefix"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._by_digest: dict[bytes, CachedBlock] = {}

    def find(self, parent: CachedBlock | str, tokens: bytes) -> CachedBlock | None:
        return self.find_again(CachedBlock(-1, parent, tokens))

    def find_again(self, sought: CachedBlock) -> CachedBlock | None:
        sought.digest = sought.digest or self.digest(sought.parent, sought.tokens)
        node = self._by_digest.get(sought.digest)
        if node is None or node.parent != sought.parent or node.tokens != sought.tokens:
            return None
        return node

    def link(self, node: CachedBlock) -> CachedBlock | None:
        node.digest = node.digest or self.digest(node.parent, node.tokens)
        displaced = self._by_digest.get(node.digest)
        self._by_digest[node.digest] = node
        return displaced

    def unlink(self, node: CachedBlock) -> None:
        del self._by_digest[node.digest]

    @staticmethod
    def digest(parent: CachedBlock | str, tokens: bytes) -> bytes:
        if isinstance(parent, str):
            return xxhash.xxh128_digest(parent.encode("utf-8", "surrogatepass") + tokens)
        return xxhash.xxh128_digest(parent.digest + tokens)


class RadixCacheManager(CachingBlockManager):
    """Keeps a tree of cached blocks for each cache salt (SGLang, Zheng et al., NeurIPS 2024)."""

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
