"""What a prefix cache remembers of requests: of those that run, and of those that wait for blocks.

A request may wait for blocks through many steps. In each step the scheduler asks for the cached
prefix of the first request in the queue. A `PrefixMatch` keeps the answer from step to step. When
the match is read, only the changes since the last step are looked up.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from memory.eviction import CachedBlock

# A block that may not be cached: its parent, and its token ids as int32 bytes.
Key = tuple[CachedBlock | str, bytes]
# Returns the cached block with the parent and the tokens of the given block, or None.
Find = Callable[[CachedBlock], CachedBlock | None]
# Number of blocks whose digests are remembered, those published last. If more blocks were published
# since a match was read, all missing blocks of the match are looked up. A step of 16,384 prompt
# tokens publishes 1,024 blocks of 16 tokens.
_NUM_NEWS = 1024


def block_tokens(token_ids: list[int], index: int, block_size: int) -> bytes:
    """Return the tokens of block `index` of `token_ids` as int32 bytes."""
    start = index * block_size
    return array("i", token_ids[start : start + block_size]).tobytes()


@dataclass(slots=True)
class RequestRecord:
    """The manager's record of one request. `begin` makes the record, and `release` deletes it."""

    tokens: list[int]  # the list given to `begin`, not a copy: the caller appends new tokens to it
    salt: str
    last: CachedBlock | str  # parent of the next block that `commit` may add to the prefix cache
    num_published: int  # number of leading blocks that are cached or equal a cached block
    hits: list[CachedBlock] | None  # cached blocks found by `begin`; None after `grow` counted them
    num_cached: int  # result of `begin`: how many leading tokens need not be computed
    # A twin is a cached block that equals a block of this request, but was computed for another
    # request. A request does not hold its twins, so a twin may be evicted while the request runs.
    twins: list[CachedBlock] = field(default_factory=list)
    next_block: Key | None = None  # this request's key in `_pending`, added by `_announce`
    publishes: bool = True  # whether `commit` caches blocks; False after `reset_prefix_cache`


@dataclass(slots=True, eq=False)
class PrefixMatch:
    """The blocks of a request that were looked up. If a block is not cached, its `block` is -1."""

    # The list that was given, not a copy. As long as the match holds the list, no other list has
    # the same `id`. The caller may only append to the list.
    tokens: list[int]
    salt: str
    blocks: list[CachedBlock] = field(default_factory=list)
    num_hits: int = 0  # how many of the first `blocks` are cached
    num_published: int = 0  # `PrefixMatches.num_published` when the match was read last
    num_lost: int = 0  # `PrefixMatches.num_lost` when the match was read last
    # The record of the running request that `pending` found, and the length of the prefix that both
    # requests share. This prefix never becomes shorter, because both only get further tokens.
    leader: RequestRecord | None = None
    num_shared: int = 0
    # Only `WindowMatches` uses the following fields: the parent of the block after `blocks`, the
    # index in `blocks` of each digest, and results of `CachingWindowManager.cached_tokens`.
    next_parent: str = ""
    places: dict[bytes, int] = field(default_factory=dict)
    longest: dict[tuple[int, int], int] = field(default_factory=dict)


class PrefixMatches:
    """The matches of the requests that asked for a cached prefix last, at most `most` of them.

    A match stays right until a block is published or leaves the cache (is lost). After a loss,
    `match` checks which blocks of the match are still cached. After a publication, `match` looks up
    the blocks after the last hit. Digests and tokens of blocks that were not found do not change,
    so they are kept.
    """

    def __init__(self, block_size: int, most: int) -> None:
        self.num_published = 0  # how many blocks have ever entered the prefix cache
        self.num_lost = 0  # how many blocks have ever left it
        self.size, self._most = block_size, most
        self._matches: dict[int, PrefixMatch] = {}  # by `id` of the token list, oldest use first

    def publish(self, node: CachedBlock) -> None:
        """Take note of a block that has entered the prefix cache."""
        self.num_published += 1

    def forget(self, token_ids: list[int]) -> None:
        """Drop the match of a list of tokens, if there is one."""
        self._matches.pop(id(token_ids), None)

    def clear(self) -> None:
        """Drop all matches."""
        self._matches.clear()

    def match(self, token_ids: list[int], salt: str, find: Find) -> PrefixMatch:
        """Return the match of the longest cached prefix of `token_ids`, as it is now.

        If a full block comes after the prefix, `blocks[num_hits]` has its parent and its tokens.
        """
        match = self._known(token_ids, salt)
        blocks = match.blocks
        if match.num_lost != self.num_lost:
            hits = enumerate(islice(blocks, match.num_hits))
            match.num_hits = next((i for i, node in hits if node.block < 0), match.num_hits)
        # A block that was not found before is still missing if nothing was published since.
        num_missing = len(blocks) if match.num_published == self.num_published else 0
        for i in range(match.num_hits, len(token_ids) // self.size):
            if i < num_missing:
                break
            parent = blocks[i - 1] if i else salt
            if i == len(blocks):
                blocks.append(CachedBlock(-1, parent, block_tokens(token_ids, i, self.size)))
            elif blocks[i].parent != parent:
                # The block before was evicted and published again. The digest is still right: it
                # is a hash of tokens.
                digest = blocks[i].digest
                blocks[i] = CachedBlock(-1, parent, blocks[i].tokens)
                blocks[i].digest = digest
            node = find(blocks[i])
            if node is None:
                break
            blocks[i], match.num_hits = node, i + 1
        match.num_published, match.num_lost = self.num_published, self.num_lost
        return match

    def _known(self, token_ids: list[int], salt: str) -> PrefixMatch:
        match = self._matches.pop(id(token_ids), None)
        if match is None or match.salt != salt:
            match = PrefixMatch(token_ids, salt)
        self._matches[id(token_ids)] = match
        if len(self._matches) > self._most:
            del self._matches[next(iter(self._matches))]
        return match


class WindowMatches(PrefixMatches):
    """Matches for an index that finds a block even if the block before it is not cached.

    A group with a sliding window has such an index (`CachingWindowManager`).

    `first_parent` returns the parent of a request's first block, given the salt. `next_parent`
    returns the parent of the next block, given a block's parent and tokens.
    """

    def __init__(
        self,
        block_size: int,
        most: int,
        first_parent: Callable[[str], str],
        next_parent: Callable[[str, bytes], str],
    ) -> None:
        super().__init__(block_size, most)
        self.first_parent, self._next_parent = first_parent, next_parent
        self._news: deque[bytes] = deque(maxlen=_NUM_NEWS)  # digests of the newest blocks

    def publish(self, node: CachedBlock) -> None:
        super().publish(node)
        self._news.append(node.digest)

    def match(self, token_ids: list[int], salt: str, find: Find) -> PrefixMatch:
        """Return the match with an entry in `blocks` for each full block. `num_hits` stays 0."""
        match = self._known(token_ids, salt)
        blocks, num_new = match.blocks, self.num_published - match.num_published
        again: Iterable[int] = range(len(blocks))
        if num_new <= len(self._news):
            newest = islice(reversed(self._news), num_new)
            again = [match.places[digest] for digest in newest if digest in match.places]
        for i in again:
            if blocks[i].block < 0 and (node := find(blocks[i])):
                blocks[i] = node
                match.longest.clear()
        parent = match.next_parent or self.first_parent(salt)
        for i in range(len(blocks), len(token_ids) // self.size):
            sought = CachedBlock(-1, parent, block_tokens(token_ids, i, self.size))
            blocks.append(find(sought) or sought)
            match.places[blocks[i].digest] = i
            parent = self._next_parent(parent, sought.tokens)
        match.next_parent, match.num_published = parent, self.num_published
        return match
