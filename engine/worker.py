"""One rank's process: it takes plans from the ring, runs them, and reports to its parent.

Nothing here imports torch: the runner that `Start` asks for does.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from config import Config
from engine.transport import Close, PlanDecoder, Ring
from engine.types import (
    KVGeometry,
    ModelRunner,
    StepHandle,
    StepPlan,
    StepResult,
)
from utils.errors import StepError

if TYPE_CHECKING:
    from utils.checkpoint import Checkpoint

# A worker without work watches the ring for this long before it sleeps: longer than the parent
# takes from one step to the next, too short to burden an idle machine.
_SPIN_SECONDS = 500e-6
# Fields of a result that most have nothing in.
_REST = ("logprobs", "prompt_logprobs", "device_seconds", "reports")
# How often a sleeper looks by itself, should its parent have missed that it sleeps.
_NAP_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank's place among the processes of an engine.

    Attributes:
        store: path of the file through which the ranks find each other.
        num_threads: CPU threads for its share of the work.
    """

    index: int
    size: int
    store: str
    num_threads: int


# What a rank runs; a function that the other process can import.
MakeRunner = Callable[[Config, "Checkpoint", Rank], ModelRunner]


class LostPeerError(Exception):
    """A collective failed because another rank did; that one's report tells more."""


@dataclass(frozen=True, slots=True)
class Start:
    """Parent to worker, once: what to run."""

    rank: Rank
    config: Config
    checkpoint: Checkpoint
    make_runner: MakeRunner


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker to parent: the model is loaded."""

    groups: tuple[KVGeometry, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """Worker to parent: the result of its `number`-th plan, counted from 0.

    As an array: 256 lists of one token take 68 us to pickle and unpickle, this way 38 in all.

    Attributes:
        tokens: of all rows, one after the other.
        counts: how many each row has; None for one each.
        rest: what else the result has, by field; None in most.
    """

    number: int
    step_id: int
    tokens: array[int]
    counts: list[int] | None
    rest: dict[str, Any] | None = None

    @staticmethod
    def of(number: int, result: StepResult) -> Done:
        """A result for the way."""
        tokens = array("q", chain.from_iterable(result.tokens))
        # Rows that failed may have no token.
        single = len(tokens) == len(result.tokens) and all(result.tokens)
        counts = None if single else [len(row) for row in result.tokens]
        there = ((name, getattr(result, name)) for name in _REST)
        rest = {name: value for name, value in there if value is not None and value != {}}
        return Done(number, result.step_id, tokens, counts, rest or None)

    def result(self, ended_at: float) -> StepResult:
        """The result that it was made of.

        Args:
            ended_at: when it came, on the clock of the process that asked for the step.
        """
        tokens = self.tokens.tolist()
        rows = [[token] for token in tokens]
        if self.counts is not None:
            rest = iter(tokens)
            rows = [list(islice(rest, count)) for count in self.counts]
        return StepResult(self.step_id, rows, ended_at, **(self.rest or {}))


@dataclass(frozen=True, slots=True)
class Failure:
    """Worker to parent, before it ends: what was raised.

    Attributes:
        traceback: as Python prints it.
        lost_peer: the cause is another rank's end.
    """

    error: Exception
    traceback: str
    lost_peer: bool

    @staticmethod
    def of(error: Exception) -> Failure:
        """The report of an exception being handled."""
        text = "".join(traceback.format_exception(error))
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever a class of unknown make may raise
            error = StepError(f"{type(error).__name__}: {error}")
        return Failure(error, text, any(isinstance(cause, LostPeerError) for cause in causes))


class Inbox:
    """The ring as one reader sees it, which the parent can wake.

    Args:
        parent: brings a byte for each wake-up, and the end of file when the parent is gone.
    """

    def __init__(self, ring: Ring, reader: int, parent: Connection) -> None:
        self._ring = ring
        self._reader = reader
        self._parent = parent
        self._decode = PlanDecoder()

    def poll(self) -> StepPlan | Close | None:
        """The next message if there is one."""
        if not self._ring.readable(self._reader):
            return None
        return self._decode(self._ring.receive(self._reader))

    def wait(self) -> StepPlan | Close:
        """The next message.

        Raises:
            EOFError: the parent is gone.
        """
        patience = time.monotonic() + _SPIN_SECONDS
        while (message := self.poll()) is None:
            if time.monotonic() < patience:
                os.sched_yield()
                continue
            self._ring.sleeps(self._reader, True)
            if not self._ring.readable(self._reader) and self._parent.poll(_NAP_SECONDS):
                self._parent.recv_bytes()
            self._ring.sleeps(self._reader, False)
        return message


def serve(runner: ModelRunner, inbox: Inbox, report: Callable[[Done], None]) -> None:
    """Run plans until `Close`, then close the runner.

    The next plan is started while the last one still runs, if the runner can tell (`done`).

    Args:
        report: takes each step's result.
    """
    pending: deque[StepHandle] = deque()
    number = 0
    while True:
        if pending and pending[0].done():
            report(Done.of(number, pending.popleft().result()))
            number += 1
            continue
        match inbox.poll() if pending else inbox.wait():
            case StepPlan() as plan:
                pending.append(runner.execute(plan))
            case Close():
                break
            case None:
                os.sched_yield()
    for handle in pending:
        handle.result()
    runner.close()


def _end_with(parent: Connection, parent_id: int) -> None:
    """End this process, wherever it is stuck, as soon as its parent has ended."""
    poller = select.poll()
    # No events asked for: the end of the other side is always told.
    poller.register(parent.fileno(), 0)
    # The second test is for a parent whose end of the connection a child of its own inherited.
    while not poller.poll(1000) and os.getppid() == parent_id:
        pass
    os._exit(1)


def main() -> None:
    """A worker process; its arguments are two inherited descriptors and its parent's id."""
    parent_file, ring_file, parent_id = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = Connection(parent_file)
    threading.Thread(target=_end_with, args=(parent, parent_id), daemon=True).start()
    status = 1
    try:
        start: Start = parent.recv()
        rank = start.rank
        runner = start.make_runner(start.config, start.checkpoint, rank)
        parent.send(Ready(runner.kv_groups))
        inbox = Inbox(Ring(ring_file, rank.size), rank.index, parent)
        # All ranks have the same results; one of them tells.
        serve(runner, inbox, _forget if rank.index else parent.send)
        status = 0
    except Exception as error:
        with suppress(OSError):  # the parent is gone
            parent.send(Failure.of(error))
    # Not sys.exit: destructors of a group whose other ranks have ended may wait for ever.
    os._exit(status)


def _forget(message: Done) -> None:
    del message
