"""The kinds of cache groups: which positions of a request a group keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from utils.errors import ContractError

NO_BLOCK = -1  # block table entry of a freed block: its positions are before the sliding window


@dataclass(frozen=True, slots=True)
class CacheKind(ABC):
    """Tells which positions a cache group keeps."""

    @abstractmethod
    def first_read(self, position: int) -> int:
        """The first position that `position` attends to. Never decreases as `position` grows."""


@dataclass(frozen=True, slots=True)
class FullPages(CacheKind):
    """Full attention: the group keeps all positions of a request as long as the request runs."""

    def first_read(self, position: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class WindowPages(CacheKind):
    """Sliding window: each position attends to itself and the `window - 1` positions before it.

    Raises a ContractError for a window below 1.
    """

    window: int  # how many positions a position attends to, itself included

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ContractError(f"a window of {self.window} positions")

    def first_read(self, position: int) -> int:
        return max(0, position - self.window + 1)
