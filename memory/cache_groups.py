"""Block managers for sliding-window attention and for models with several cache groups."""

from __future__ import annotations

from config import Config
from engine.types import NO_BLOCK, BlockManager, KVGeometry
from memory.block_manager import PagedBlockManager
from utils.errors import ContractError


class WindowBlockManager(PagedBlockManager):
    """Frees a request's block when no later position attends to the block. Has no prefix cache.

    A request starts only if blocks for all its tokens are free, even if it has more tokens than the
    window. So the cache must have enough blocks for all tokens of the longest request.
    """

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._kind = geometry.kind
        # Request id -> how many blocks at the start of the request's table have been freed.
        self._num_freed: dict[int, int] = {}

    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        self._num_freed[request_id] = 0
        return super().begin(request_id, token_ids, cache_salt)

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """Free the request's blocks to which no position from `num_computed` on attends."""
        table, freed = self._tables[request_id], self._num_freed[request_id]
        first_read = self._kind.first_read(num_computed) // self.block_size
        for place in range(freed, first_read):
            self._drop(table[place])
            table[place] = NO_BLOCK
        self._num_freed[request_id] = max(freed, first_read)

    def release(self, request_id: int) -> None:
        del self._tables[request_id][: self._num_freed.pop(request_id)]
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
        # A request's block tables have equal lengths in all groups, so each gets `wanted` blocks.
        wanted = -(-num_tokens // self.block_size) - len(self.table(request_id))
        if wanted > self.num_free_blocks:
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
