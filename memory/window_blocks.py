"""The blocks of layers that see a window of positions."""

from __future__ import annotations

from config import Config
from engine.types import NO_BLOCK, KVGeometry
from memory.block_manager import PagedBlockManager


class WindowBlockManager(PagedBlockManager):
    """Gives a request's blocks back as they leave its window, without prefix caching.

    A request gets blocks for its whole prompt when it is admitted, and gives them back as its
    prefill is committed. So a window group needs as many blocks as its longest request at first.
    """

    def __init__(self, config: Config, geometry: KVGeometry) -> None:
        super().__init__(config, geometry)
        self._kind = geometry.kind
        # By request, the leading table entries that were given back.
        self._num_freed: dict[int, int] = {}

    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        self._num_freed[request_id] = 0
        return super().begin(request_id, token_ids, cache_salt)

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        """Give back what computing position `num_computed`, or any later one, does not read."""
        table, freed = self._tables[request_id], self._num_freed[request_id]
        first_read = self._kind.first_read(num_computed) // self.block_size
        for place in range(freed, first_read):
            self._drop(table[place])
            table[place] = NO_BLOCK
        self._num_freed[request_id] = max(freed, first_read)

    def release(self, request_id: int) -> None:
        del self._tables[request_id][: self._num_freed.pop(request_id)]
        super().release(request_id)
