"""A block manager under audit: every call is compared with what the contract promises."""

from __future__ import annotations

from collections import Counter
from typing import Any

from engine.types import (
    NO_BLOCK,
    BlockCopy,
    BlockManager,
    CacheKind,
    FullPages,
    PendingPrefix,
    WindowPages,
)
from utils.errors import ContractError


def require(holds: bool, rule: str) -> None:
    """Raise ContractError with `rule` unless it holds."""
    if not holds:
        raise ContractError(rule)


class AuditedBlocks:
    """Passes calls on to a block manager and checks arguments and answers.

    It keeps its own account, from the answers alone: which request holds which block, and what
    a block is known to hold. What it does not know, it passes on unchecked.

    Args:
        kind: of the cache group.

    Attributes:
        in_flight: steps in flight of each request; kept by whoever drives.
        salts: the cache salt of each request; likewise, and unknown ones are not compared.
        written: leading positions of each request whose KV a committed step wrote; likewise.
        num_hit_tokens: leading tokens that `begin` found in the cache, over all calls.
    """

    def __init__(self, inner: BlockManager, kind: CacheKind | None = None) -> None:
        self.inner = inner
        self._kind = kind or FullPages()
        self.in_flight: Counter[int] = Counter()
        self.salts: dict[int, str] = {}
        self.written: dict[int, int] = {}
        self.num_hit_tokens = 0
        self._size = inner.block_size
        self._tables: dict[int, list[int]] = {}
        self._keys: dict[int, list[int]] = {}
        self._holders: Counter[int] = Counter()
        self._content: dict[int, int] = {}
        # Requests that wait for a copy: the block, and the key of what it has to hold.
        self._uncopied: dict[int, tuple[int, int]] = {}
        self._check_count("a new manager")

    @property
    def groups(self) -> tuple[AuditedBlocks, ...]:
        """Itself, so that nobody passes it by."""
        return (self,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def begin(
        self, request_id: int, token_ids: list[int], cache_salt: str = "", *about: Any
    ) -> int:
        """Hits must be fewer than all tokens, and whole blocks that hold what the request needs.

        But for the last one, which may be a block of its own that waits for a copy.
        """
        require(request_id not in self._tables, f"begin({request_id}) of a request that has begun")
        salt = self.salts.get(request_id, cache_salt)
        require(cache_salt == salt, f"begin({request_id}) with salt {cache_salt!r}, not {salt!r}")
        cached = self.inner.begin(request_id, token_ids, cache_salt, *about)
        table = self.inner.table(request_id)
        require(
            0 <= cached < max(len(token_ids), 1),
            f"begin({request_id}) found {cached} of {len(token_ids)} tokens",
        )
        require(
            len(table) == -(-cached // self._size),
            f"begin({request_id}) found {cached} tokens and made a table of {len(table)} blocks",
        )
        shared = table[: cached // self._size]
        keys = self._chain([hash(cache_salt)], token_ids, cached)
        first = self._kind.first_read(cached) // self._size if cached else 0
        require(shared[:first] == [NO_BLOCK] * first, f"begin({request_id}): {shared}, {cached}")
        for index, block in enumerate(shared[first:], first):
            require(
                self._content.get(block) == keys[index + 1],
                f"begin({request_id}): block {block} is not known to hold the tokens before "
                f"position {(index + 1) * self._size}",
            )
        self._tables[request_id] = list(shared)
        self._keys[request_id] = keys
        self._holders.update(shared[first:])
        for block in table[len(shared) :]:
            self._hand_out(request_id, block, f"begin({request_id})")
            key = self._chain(list(keys), token_ids, len(table) * self._size)[-1]
            self._uncopied[request_id] = block, key
        self.written[request_id] = cached
        self.num_hit_tokens += cached
        self._check_count(f"begin({request_id})")
        return cached

    def fits(self, token_ids: list[int], cache_salt: str = "", *about: Any) -> bool:
        """The same for a list that was seen before and for one that was not; changes nothing."""
        fits: bool = self.inner.fits(token_ids, cache_salt, *about)
        afresh = [*token_ids]
        again = self.inner.fits(afresh, cache_salt, *about)
        self.inner.abandon(afresh)
        require(fits == again, f"fits({token_ids}) is {fits}, and {again} for an equal list")
        self._check_count(f"fits({token_ids})")
        return fits

    def grow(self, request_id: int, num_tokens: int) -> bool:
        """As many new blocks as needed, held by no one else; or False and no change.

        A window needs no more blocks than the manager says that a request ever holds.
        """
        mine = self._tables[request_id]
        wanted = max(0, -(-num_tokens // self._size) - len(mine))
        if isinstance(self._kind, WindowPages):
            held = len(mine) - mine.count(NO_BLOCK)
            wanted = min(wanted, max(0, self.inner.most_blocks(num_tokens) - held))
        free = self.inner.num_free_blocks
        grown = self.inner.grow(request_id, num_tokens)
        what = f"grow({request_id}, {num_tokens})"
        require(grown == (wanted <= free), f"{what} is {grown} with {free} free, {wanted} needed")
        table = self.inner.table(request_id)
        expected = len(mine) + (wanted if grown else 0)
        require(len(table) == expected, f"{what} made a table of {len(table)} blocks")
        require(table[: len(mine)] == mine, f"{what} changed the blocks there were")
        for block in table[len(mine) :]:
            self._hand_out(request_id, block, what)
        self._check_count(what)
        return grown

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """Only what a committed step wrote may be published."""
        require(request_id not in self._uncopied, f"commit({request_id}) before `take_copies`")
        require(
            num_computed <= min(self.written[request_id], len(token_ids)),
            f"commit({request_id}) of {num_computed} positions, {self.written[request_id]} written",
        )
        self.inner.commit(request_id, token_ids, num_computed)
        keys = self._chain(self._keys[request_id], token_ids, num_computed)
        for block, key in zip(self._tables[request_id], keys[1:], strict=False):
            self._content[block] = key
        self._slide(request_id, num_computed)
        self._check_count(f"commit({request_id})")

    def _slide(self, request_id: int, num_computed: int) -> None:
        """Blocks that no later position reads come back, and no others."""
        mine, table = self._tables[request_id], self.inner.table(request_id)
        first, freed = self._kind.first_read(num_computed) // self._size, set[int]()
        for place, block in enumerate(mine[:first]):
            if block != NO_BLOCK:
                self._holders[block] -= 1
                if not self._holders[block]:
                    del self._holders[block]
                mine[place] = NO_BLOCK
                freed.add(block)
        what = f"commit({request_id}) of {num_computed} positions"
        # Blocks that left the window may be those of the request's next positions.
        moved = table[len(mine) :]
        require(set(moved) <= freed, f"{what} takes other blocks than {freed}: {moved}")
        for block in moved:
            self._hand_out(request_id, block, what)
        require(table == mine, f"{what} leaves table {table}")

    def release(self, request_id: int) -> None:
        """Not while a step in flight uses the blocks."""
        require(not self.in_flight[request_id], f"release({request_id}) with a step in flight")
        require(request_id in self._tables, f"release({request_id}) of a request without a table")
        for block in self._tables.pop(request_id):
            if block == NO_BLOCK:
                continue
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
        del self._keys[request_id], self.written[request_id]
        self._uncopied.pop(request_id, None)
        self.inner.release(request_id)
        self._check_count(f"release({request_id})")

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """One copy for each request that waits for one, of a block that holds what it needs."""
        copies: tuple[BlockCopy, ...] = self.inner.take_copies()
        wanted = dict(self._uncopied.values())
        self._uncopied.clear()
        require(
            sorted(copy.target for copy in copies) == sorted(wanted),
            f"take_copies() is {copies}, blocks {sorted(wanted)} need them",
        )
        for source, target in ((copy.source, copy.target) for copy in copies):
            require(
                self._content.get(source) == wanted[target],
                f"take_copies(): block {source} does not hold what block {target} has to",
            )
        self._check_count("take_copies()")
        return copies

    def pending(
        self, token_ids: list[int], cache_salt: str = "", *about: Any
    ) -> PendingPrefix | None:
        """Whole blocks that a request which has begun will compute."""
        prefix: PendingPrefix | None = self.inner.pending(token_ids, cache_salt, *about)
        afresh = [*token_ids]
        again = self.inner.pending(afresh, cache_salt, *about)
        self.inner.abandon(afresh)
        require(prefix == again, f"pending({token_ids}) is {prefix}, and {again} for an equal list")
        if prefix is not None:
            size, what = self._size, f"pending({token_ids}) is {prefix}"
            require(prefix.request_id in self._tables, f"{what}: that request has not begun")
            require(prefix.num_tokens % size == 0 < prefix.num_tokens <= len(token_ids), what)
        return prefix

    def check_idle(self) -> None:
        """No request holds a block, and every block is free."""
        require(not self._tables, f"requests {sorted(self._tables)} still hold block tables")
        self._check_count("at the end")

    def _hand_out(self, request_id: int, block: int, what: str) -> None:
        require(0 <= block < self.inner.num_blocks, f"{what}: there is no block {block}")
        require(not self._holders[block], f"{what}: block {block} is held already")
        self._holders[block] = 1
        self._content.pop(block, None)
        self._tables[request_id].append(block)

    def _chain(self, keys: list[int], token_ids: list[int], num_tokens: int) -> list[int]:
        """`keys`, the key of each prefix of whole blocks, extended to `num_tokens`; in place."""
        for end in range(len(keys) * self._size, num_tokens + 1, self._size):
            keys.append(hash((keys[-1], *token_ids[end - self._size : end])))
        return keys

    def _check_count(self, what: str) -> None:
        for request_id, mine in self._tables.items():
            held, blocks = self.inner.held(request_id), len(mine) - mine.count(NO_BLOCK)
            require(held == blocks, f"{what}: held({request_id}) is {held}, not {blocks}")
        free, held = self.inner.num_free_blocks, len(self._holders)
        # A block that is still to be copied is not free; nor is it held, as far as one can tell.
        missing = self.inner.num_blocks - free - held
        require(
            0 <= missing <= len(self._uncopied),
            f"{what}: {free} blocks are free and {held} held, of {self.inner.num_blocks}",
        )
