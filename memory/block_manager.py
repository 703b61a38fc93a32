"""Block managers: one that shares no blocks, and two that share the blocks of equal prefixes."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from dataclasses import dataclass, field

import xxhash

from config import Config
from engine.types import BlockCopy, BlockManager, CacheStats, KVGeometry, PendingPrefix
from memory.eviction import CachedBlock, EvictionPolicy
from utils.registry import PartKind


class PagedBlockManager(BlockManager):
    """Hands out free blocks; a block belongs to one request (vLLM, Kwon et al., SOSP 2023)."""

    name = "paged"
    block_size = num_blocks = 0

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        self.block_size, self.num_blocks = geometry.block_size, geometry.num_blocks
        # A stack with the lowest id on top: the block that was freed last is handed out first.
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
            table.append(self._take())
        return True

    def table(self, request_id: int) -> list[int]:
        return self._tables[request_id]

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """Do nothing: without prefix caching there is nothing to publish."""

    def release(self, request_id: int) -> None:
        for block in reversed(self._tables.pop(request_id)):
            self._drop(block)

    def _take(self) -> int:
        """Take a free block, and count its first reference. The caller has checked for space."""
        block = self._free.pop()
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        """Give up one reference to a block."""
        assert self._references[block] > 0, "release of a free block"
        self._references[block] -= 1
        if self._references[block] == 0:
            self._give(block)

    def _give(self, block: int) -> None:
        """Free a block whose last reference was given up."""
        self._free.append(block)


# Content of a block: the cached block before it (for a first block the cache salt), its tokens.
_Key = tuple[CachedBlock | str, bytes]


@dataclass(slots=True)
class _Request:
    """A request between `begin` and `release`."""

    tokens: list[int]  # the caller's own list, which grows
    salt: str
    last: CachedBlock | str  # cached block of the last published block; the salt if there is none
    num_published: int  # leading blocks that other requests can find
    hits: list[CachedBlock] | None  # cached blocks found; None after the first successful `grow`
    num_cached: int  # leading tokens that were found in the cache
    # Cached blocks of other requests that equal blocks of this request. This request computed its
    # own blocks, and holds no reference to the cached ones.
    twins: list[CachedBlock] = field(default_factory=list)
    next_block: _Key | None = None  # the first unpublished block, if it is in `_pending`
    publishes: bool = True  # False after a reset of the prefix cache


class CachingBlockManager(PagedBlockManager):
    """Shares full blocks between requests that start with the same tokens and cache salt.

    `commit` publishes a block: other requests can find it from then on, until it is evicted. If
    requests compute equal blocks side by side, only the first block is published. A block is found
    through the block before it. So a hit is exact: the tokens of all blocks up to it were compared.

    Subclasses implement the index of published blocks: `find`, `link` and `unlink`.
    """

    caches_prefixes = True

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        kind = PartKind("eviction_policy", "memory.eviction:EvictionPolicy", ("memory",))
        self._idle: EvictionPolicy = kind.make(config.eviction_policy, config, geometry)
        self._cached: dict[int, CachedBlock] = {}
        self._requests: dict[int, _Request] = {}
        self._pending: dict[_Key, int] = {}
        # Copies for the next plan, by request id. A copy holds a reference to its source block.
        self._copies: dict[int, BlockCopy] = {}
        self._queried_tokens = self._hit_tokens = self._evicted_blocks = 0

    @abstractmethod
    def find(self, parent: CachedBlock | str, tokens: bytes) -> CachedBlock | None:
        """The published block with this `parent` (for a first block a salt) and int32 `tokens`."""

    @abstractmethod
    def link(self, node: CachedBlock) -> CachedBlock | None:
        """Add a block that `find` did not find. Returns the block that it displaced, if any."""

    @abstractmethod
    def unlink(self, node: CachedBlock) -> None:
        """Remove a block from the index. The blocks behind it need not be found any more."""

    @property
    def num_free_blocks(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def stats(self) -> CacheStats:
        counts = self._queried_tokens, self._hit_tokens, self._evicted_blocks
        return CacheStats(*counts, len(self._cached))

    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        super().begin(request_id, token_ids, cache_salt)
        hits = self._match(token_ids, cache_salt)
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
        self._requests[request_id] = _Request(
            token_ids, cache_salt, last, num_shared, hits, num_cached
        )
        return num_cached

    def grow(self, request_id: int, num_tokens: int) -> bool:
        if not super().grow(request_id, num_tokens):
            return False
        request = self._requests[request_id]
        if request.hits is not None:
            # If `begin` counted, a request that waits for space would be counted at each attempt.
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
            # A twin was evicted, and blocks published behind it cannot be found. Publish all again.
            request.last, request.num_published, request.twins = request.salt, 0, []
        table = self._tables[request_id]
        for i in range(request.num_published, num_computed // self.block_size):
            tokens = self._block_tokens(token_ids, i)
            node = self.find(request.last, tokens)
            if node is None:
                node = self._publish(CachedBlock(table[i], request.last, tokens))
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
            # The plan copies first: a new owner of the source writes to it in a later step.
            self._drop(copy.source)
        return copies

    def pending(self, token_ids: list[int], cache_salt: str = "") -> PendingPrefix | None:
        if not self._pending:
            return None
        hits = self._match(token_ids, cache_salt)
        size, end = self.block_size, (len(hits) + 1) * self.block_size
        if end > len(token_ids):
            return None
        key = hits[-1] if hits else cache_salt, self._block_tokens(token_ids, len(hits))
        if (request_id := self._pending.get(key)) is None:
            return None
        theirs = self._requests[request_id].tokens
        while (last := end + size) <= len(token_ids) and token_ids[end:last] == theirs[end:last]:
            end = last
        return PendingPrefix(request_id, end)

    def reset_prefix_cache(self) -> None:
        for node in list(self._cached.values()):
            self.unlink(node)
            self._forget(node)
        self._pending.clear()
        for request in self._requests.values():
            request.publishes, request.next_block = False, None

    def _give_up_last(self, request_id: int, hits: list[CachedBlock]) -> int:
        """Replace the last block of a prompt of which all blocks were found in the cache.

        The last token is computed again for its logits, and no shared block may be written. So the
        table gets a copy of the block. If no block is free, or if blocks have one token, the table
        gets no block instead. Returns how many tokens have to be computed.
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

    def _match(self, token_ids: list[int], salt: str) -> list[CachedBlock]:
        """The cached blocks that hold the first tokens, in order."""
        hits: list[CachedBlock] = []
        parent: CachedBlock | str = salt
        for i in range(len(token_ids) // self.block_size):
            node = self.find(parent, self._block_tokens(token_ids, i))
            if node is None:
                break
            hits.append(node)
            parent = node
        return hits

    def _block_tokens(self, token_ids: list[int], index: int) -> bytes:
        start = index * self.block_size
        return array("i", token_ids[start : start + self.block_size]).tobytes()

    def _publish(self, node: CachedBlock) -> CachedBlock:
        if stale := self._cached.get(node.block):
            # The block was published before, behind a block that was evicted since.
            self.unlink(stale)
            self._forget(stale)
        if displaced := self.link(node):
            self._forget(displaced)
        self._cached[node.block] = node
        return node

    def _announce(self, request_id: int, request: _Request) -> None:
        """Enter the request's next unpublished block into `_pending`, if its tokens are known.

        One block is enough: a request that waits for it asks again after its publication.
        """
        if len(request.tokens) >= (request.num_published + 1) * self.block_size:
            key = request.last, self._block_tokens(request.tokens, request.num_published)
            if self._pending.setdefault(key, request_id) == request_id:
                request.next_block = key

    def _withdraw(self, request: _Request) -> None:
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
        return super()._take()

    def _give(self, block: int) -> None:
        if node := self._cached.get(block):
            self._idle.add(node)
        else:
            self._free.append(block)

    def _forget(self, node: CachedBlock) -> None:
        """Stop caching a block that has left the index. A block that no request holds is free."""
        del self._cached[node.block]
        if self._references[node.block] == 0:
            self._idle.remove(node)
            self._free.append(node.block)
        node.block = -1


class PrefixCacheManager(CachingBlockManager):
    """Finds a block by a 128-bit digest of its parent's digest and its tokens, as vLLM does.

    The digest only says where to look: parent and tokens of the block found there are compared.
    So neither a digest collision nor an evicted parent ever causes a wrong hit.
    """

    name = "prefix"

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._by_digest: dict[bytes, CachedBlock] = {}

    def find(self, parent: CachedBlock | str, tokens: bytes) -> CachedBlock | None:
        node = self._by_digest.get(self.digest(parent, tokens))
        if node is None or node.parent != parent or node.tokens != tokens:
            return None
        return node

    def link(self, node: CachedBlock) -> CachedBlock | None:
        node.digest = self.digest(node.parent, node.tokens)
        displaced = self._by_digest.get(node.digest)
        self._by_digest[node.digest] = node
        return displaced

    def unlink(self, node: CachedBlock) -> None:
        del self._by_digest[node.digest]

    @staticmethod
    def digest(parent: CachedBlock | str, tokens: bytes) -> bytes:
        """The digest of the block with `tokens` whose parent is `parent`."""
        if isinstance(parent, str):
            return xxhash.xxh128_digest(parent.encode("utf-8", "surrogatepass") + tokens)
        return xxhash.xxh128_digest(parent.digest + tokens)


class RadixCacheManager(CachingBlockManager):
    """Finds blocks in a tree of tokens per cache salt (SGLang, Zheng et al., NeurIPS 2024).

    An edge has the tokens of one block. Block tables cannot share shorter pieces, and longer edges
    would have to be split where prompts diverge.
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
