"""Users get equal shares of the engine, however much each of them asks for."""

from __future__ import annotations

from collections import defaultdict

from config import Config
from engine.policies.base import QueuePolicy
from engine.policies.queue import FirstCome
from engine.sequence import Sequence
from utils.lazy_heap import LazyHeap


class _UserQueue(QueuePolicy):
    """The next request of the user at the lowest level; a user's own in order of arrival."""

    def __init__(self, config: Config) -> None:
        # One number for every user seen; users who wait are also in a queue and in the order.
        self.levels: defaultdict[str, int] = defaultdict(int)
        self._queues: defaultdict[str, FirstCome] = defaultdict(lambda: FirstCome(config))
        self._order: LazyHeap[str] = LazyHeap()
        self._now = 0

    def push(self, seq: Sequence) -> None:
        user = seq.sampling.user
        returns = user not in self._queues
        self._queues[user].push(seq)
        if returns:
            self._raise(user, max(0, self._now - self.levels[user]))

    def first(self) -> Sequence | None:
        while (user := self._order.first()) is not None:
            if seq := self._queues[user].first():
                return seq
            del self._queues[user]
            self._order.remove(user)
        return None

    def pop(self) -> Sequence:
        user = self._order.first()
        assert user is not None, "pop() of an empty queue"
        self._now = self.levels[user]
        return self._queues[user].pop()

    def discard(self, seq: Sequence) -> None:
        self._queues[seq.sampling.user].discard(seq)

    def _raise(self, user: str, tokens: int) -> None:
        self.levels[user] += tokens
        if user in self._queues:
            self._order.push((self.levels[user], user), user)


class FairShare(_UserQueue):
    """The user who was served the fewest tokens first.

    The virtual token counter of Sheng et al. (Fairness in Serving Large Language Models, OSDI
    2024): a user who comes back is lifted to the level of those served now, so that idle time
    gives no credit. A request is charged its expected tokens when it starts, and settled to
    what it took when it ends; a preempted one, computed again, is charged once.
    """

    name = "fair_share"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.charged: dict[int, int] = {}

    def push(self, seq: Sequence) -> None:
        if seq.request_id in self.charged:
            self._settle(seq, 0)
        super().push(seq)

    def pop(self) -> Sequence:
        seq = super().pop()
        self.charged[seq.request_id] = seq.num_expected_tokens
        self._raise(seq.sampling.user, seq.num_expected_tokens)
        return seq

    def ended(self, seq: Sequence) -> None:
        self._settle(seq, len(seq.token_ids))

    def _settle(self, seq: Sequence, tokens: int) -> None:
        self._raise(seq.sampling.user, tokens - self.charged.pop(seq.request_id))
