"""The queue policy that gives each user an equal share."""

from __future__ import annotations

from collections import Counter

from config import Config
from engine.policies import FirstCome, QueuePolicy
from engine.requests import Sequence
from utils.lazy_heap import LazyHeap


class _UserQueue(QueuePolicy):
    """Serves the user with the lowest level first. A user's level is the number of charged tokens.

    The *fair level* is the level of a user who has got an equal share: when a request ends, the
    fair level rises by the request's tokens, divided by the number of users with requests. A user
    without waiting requests who adds one is raised at least to the fair level. This is the virtual
    time of fair queueing (Demers, Keshav and Shenker, SIGCOMM 1989).

    A user without requests is forgotten when the fair level has reached the user's level. If the
    user returns, the level is raised to the fair level anyway, so nothing is lost. When no user has
    requests, all users are forgotten, and so are the differences of their levels.
    """

    def __init__(self, config: Config) -> None:
        self.levels: dict[str, float] = {}
        self.fair_level = 0.0
        self._config = config
        self._queues: dict[str, FirstCome] = {}  # of the users with waiting requests
        self._order: LazyHeap[str] = LazyHeap()  # the same users by level
        self._idle: LazyHeap[str] = LazyHeap()  # users without requests by level
        self._counts: Counter[str] = Counter()  # how many requests of a user wait or run

    def push(self, seq: Sequence) -> None:
        user = seq.sampling.user
        if user not in self._queues:
            self._queues[user] = FirstCome(self._config)
            self._charge(user, max(0, self.fair_level - self.levels.get(user, 0)))
        self._queues[user].push(seq)

    def first(self) -> Sequence | None:
        user = self._order.first()
        return None if user is None else self._queues[user].first()

    def pop(self) -> Sequence:
        seq = self.first()
        assert seq is not None, "pop() of an empty queue"
        self._remove(seq)
        return seq

    def discard(self, seq: Sequence) -> None:
        self._remove(seq)
        self._leave(seq.sampling.user)

    def _remove(self, seq: Sequence) -> None:
        queue = self._queues[seq.sampling.user]
        queue.discard(seq)
        if queue.first() is None:
            del self._queues[seq.sampling.user]
            self._order.remove(seq.sampling.user)

    def _charge(self, user: str, tokens: float) -> None:
        self.levels[user] = self.levels.get(user, 0) + tokens
        if user in self._queues:
            self._order.push((self.levels[user], user), user)

    def _arrive(self, user: str) -> None:
        self._counts[user] += 1
        if user in self._idle:
            self._idle.remove(user)

    def _leave(self, user: str) -> None:
        self._counts[user] -= 1
        if not self._counts[user]:
            del self._counts[user]
            self._idle.push(self.levels[user], user)
        while (idle := self._idle.first()) is not None:
            if self._counts and self.levels[idle] > self.fair_level:
                break
            self._idle.remove(idle)
            del self.levels[idle]


class FairShare(_UserQueue):
    """Serves the waiting user who has been charged the fewest tokens so far.

    Implements the virtual token counter (Sheng et al., Fairness in Serving Large Language Models,
    OSDI 2024). When a request leaves the queue, its user is charged the request's expected length.
    When the request ends, the charge is changed to the request's real length. When a request
    returns to the queue, the charge is taken back.
    """

    name = "fair_share"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.charged: dict[int, int] = {}

    def push(self, seq: Sequence) -> None:
        if seq.request_id in self.charged:
            self._settle(seq, 0)
        else:
            self._arrive(seq.sampling.user)
        super().push(seq)

    def pop(self) -> Sequence:
        seq = super().pop()
        self.charged[seq.request_id] = seq.num_expected_tokens
        self._charge(seq.sampling.user, seq.num_expected_tokens)
        return seq

    def ended(self, seq: Sequence) -> None:
        self._settle(seq, len(seq.token_ids))
        self.fair_level += len(seq.token_ids) / len(self._counts)
        self._leave(seq.sampling.user)

    def _settle(self, seq: Sequence, tokens: int) -> None:
        self._charge(seq.sampling.user, tokens - self.charged.pop(seq.request_id))
