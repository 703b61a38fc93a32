"""One block manager made of those of several cache groups."""

from __future__ import annotations

from engine.types import BlockManager
from utils.errors import ContractError


class GroupedBlockManager(BlockManager):
    """Passes every call to the manager of each group; `grow` succeeds in all groups or in none.

    A cached prefix can be used only if every group has it. So the managers must not cache prefixes.

    Args:
        managers: of each group, in order; of equal block sizes.

    Raises:
        ContractError: block sizes differ, or a manager caches prefixes.
    """

    groups: tuple[BlockManager, ...] = ()

    def __init__(self, managers: tuple[BlockManager, ...]) -> None:
        sizes = {blocks.block_size for blocks in managers}
        if len(sizes) != 1:
            raise ContractError(f"cache groups of different block sizes: {sorted(sizes)}")
        if any(blocks.caches_prefixes for blocks in managers):
            raise ContractError("several cache groups, and a block manager that caches prefixes")
        self.groups = managers

    @property
    def block_size(self) -> int:
        return self.groups[0].block_size

    @property
    def num_blocks(self) -> int:
        return min(blocks.num_blocks for blocks in self.groups)

    @property
    def num_free_blocks(self) -> int:
        return min(blocks.num_free_blocks for blocks in self.groups)

    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        return max(blocks.begin(request_id, token_ids, cache_salt) for blocks in self.groups)

    def grow(self, request_id: int, num_tokens: int) -> bool:
        # Tables of all groups have the same length: freed entries stay in them.
        wanted = -(-num_tokens // self.block_size) - len(self.table(request_id))
        if wanted > self.num_free_blocks:
            return False
        for blocks in self.groups:
            if not blocks.grow(request_id, num_tokens):
                raise ContractError(f"{type(blocks).__name__} does not grow, and has free blocks")
        return True

    def table(self, request_id: int) -> list[int]:
        """The first group's; those of the others are had from `groups`."""
        return self.groups[0].table(request_id)

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        for blocks in self.groups:
            blocks.commit(request_id, token_ids, num_computed)

    def release(self, request_id: int) -> None:
        for blocks in self.groups:
            blocks.release(request_id)


def grouped(managers: tuple[BlockManager, ...]) -> BlockManager:
    """One manager for all groups; the only one there is, if it is one."""
    return managers[0] if len(managers) == 1 else GroupedBlockManager(managers)
