"""The contracts of scheduling policies. Pure CPU work, called between steps from one thread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar

from config import Config
from engine.running_batch import RunningBatch
from engine.sequence import Sequence


class Policy(ABC):
    """One decision of a scheduler; its constructor takes the engine's options."""

    name: ClassVar[str]

    def __init__(self, config: Config) -> None:
        del config


class QueuePolicy(Policy):
    """Holds the waiting requests and says which runs next.

    A step asks a few times whatever the number that waits, so no method may look at all of them.
    `engine.policies.queue.KeyedQueue` does the work for every order given by a key.
    """

    @abstractmethod
    def push(self, seq: Sequence) -> None:
        """A request waits: new, or back after `pop`, preempted (`seq.num_preemptions`) or not."""

    @abstractmethod
    def first(self) -> Sequence | None:
        """The request to run next; None if none waits."""

    @abstractmethod
    def pop(self) -> Sequence:
        """Take out what `first` returned."""

    @abstractmethod
    def discard(self, seq: Sequence) -> None:
        """A waiting request was aborted: its `finish_reason` is set, `first` must not return it."""

    def ended(self, seq: Sequence) -> None:
        """A request that had been popped has finished or was aborted."""
        del seq


class AdmissionPolicy(Policy):
    """Whether a waiting request may join the running ones."""

    @abstractmethod
    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        """Whether `seq`, the first of the queue, may start now.

        Asked only while other requests run. That there are blocks for the tokens known so far is
        checked afterwards. The batch must not be changed.
        """


class PreemptionPolicy(Policy):
    """Who gives up its blocks when a running request needs one and none is free."""

    @abstractmethod
    def victim(self, running: Collection[Sequence]) -> Sequence:
        """One of `running`, which is in order of admission and never empty."""


class StepPolicy(Policy):
    """How a step's token budget is split between prompts and running decodes."""

    @abstractmethod
    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        """Tokens, 1 to `budget`, that prompts may take; the decodes run if the rest holds them all.

        Args:
            budget: tokens of the whole step, not less than the requests that can run.
            num_decodes: running requests that could each compute one token.
            gap: steps in a row, up to now, in which they had to wait.
        """
