"""Block managers for sliding-window attention and for models with several cache groups."""

from __future__ import annotations

from config import Config
from engine.types import NO_BLOCK, BlockManager, KVGeometry
from memory.block_manager import PagedBlockManager
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
    longer prompt gets blocks only for its first positions. `commit` moves blocks that have left the
    window to the end of the table, until the table has room for the whole prompt. So a request that
    has begun needs no further blocks for its prompt.
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

    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        self._num_freed[request_id] = self._num_places[request_id] = 0
        return super().begin(request_id, token_ids, cache_salt)

    def grow(self, request_id: int, num_tokens: int) -> bool:
        if not super().grow(request_id, num_tokens):
            return False
        self._num_places[request_id] = -(-num_tokens // self.block_size)
        return True

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """Free or move the request's blocks to which no position from `num_computed` on attends."""
        table, freed = self._tables[request_id], self._num_freed[request_id]
        first_read = self._geometry.kind.first_read(num_computed) // self.block_size
        for place in range(freed, first_read):
            block, table[place] = table[place], NO_BLOCK
            if len(table) < self._num_places[request_id]:
                table.append(block)
            else:
                self._drop(block)
        self._num_freed[request_id] = max(freed, first_read)

    def release(self, request_id: int) -> None:
        del self._tables[request_id][: self._num_freed.pop(request_id)]
        del self._num_places[request_id]
        super().release(request_id)


class GroupedBlockManager(BlockManager):
    """Combines the block managers of all cache groups. `grow` adds blocks in all groups or in none.

    The constructor raises a ContractError if the managers' block sizes differ, or if a manager
    caches prefixes, since a request could use a cached prefix only if all groups had cached it.
    """

    groups: tuple[BlockManager, ...] = ()
    block_size = num_blocks = 0

    def __init__(self, managers: tuple[BlockManager, ...]) -> None:
        sizes = {blocks.block_size for blocks in managers}
        if len(sizes) != 1:
            raise ContractError(f"cache groups of different block sizes: {sorted(sizes)}")
        if any(blocks.caches_prefixes for blocks in managers):
            raise ContractError("several cache groups, and a block manager that caches prefixes")
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


def grouped(managers: tuple[BlockManager, ...]) -> BlockManager:
    """Return the only manager, or a GroupedBlockManager of all managers if there are several."""
    return managers[0] if len(managers) == 1 else GroupedBlockManager(managers)
