"""One rank's process: it runs the plans that come, and reports. Nothing here imports torch."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from config import Config
from engine.ranks.channel import Channel, PlanCodec, encode
from engine.types import ModelRunner, StepHandle
from utils.errors import StepError

if TYPE_CHECKING:
    from utils.checkpoint import Checkpoint

# A rank without work watches its channel for so long before it sleeps: longer than the runner takes
# from one step to the next, too short to burden an idle machine.
_SPIN_SECONDS = 500e-6


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank's place among the processes of an engine."""

    index: int
    size: int
    store: str  # path of the file through which the ranks find each other
    num_threads: int  # of the CPU, for its share of the work


# What a rank runs; a function that the other process can import.
MakeRunner = Callable[[Config, "Checkpoint", Rank], ModelRunner]


class LostPeerError(Exception):
    """A collective failed because another rank did; that one's report tells more."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Rank to runner, before the rank ends: what was raised."""

    error: Exception
    traceback: str  # as Python prints it
    lost_peer: bool  # the cause is another rank's end

    @staticmethod
    def of(error: Exception) -> Failure:
        """The report of an exception being handled."""
        text = "".join(traceback.format_exception(error))
        cause: BaseException | None = error
        seen: set[int] = set()
        while cause is not None and not isinstance(cause, LostPeerError):
            seen.add(id(cause))
            cause = cause.__cause__ or cause.__context__
            # An exception may be its own cause.
            cause = None if id(cause) in seen else cause
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever a class of unknown make may raise
            error = StepError(f"{type(error).__name__}: {error}")
        return Failure(error, text, lost_peer=cause is not None)


def serve(runner: ModelRunner, channel: Channel, *, reports: bool) -> None:
    """Run plans until the channel ends, then close the runner; send results if it `reports`.

    The next plan is started while the last one still runs, if the runner can tell (`done`).
    """
    codec = PlanCodec()
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    pending: deque[StepHandle] = deque()
    watched_until = 0.0
    while True:
        if pending and pending[0].done():
            result = pending.popleft().result()
            if reports:
                channel.post(encode(result))
            watched_until = time.monotonic() + _SPIN_SECONDS
        elif (pending or time.monotonic() < watched_until) and not poll.poll(0):
            os.sched_yield()
        elif (message := channel.receive()) is not None:
            pending.append(runner.execute(codec.decode(message)))
        else:
            break
    for handle in pending:
        handle.result()
    runner.close()


def _end_with_parent(channel: Channel, parent_id: int) -> None:
    """End this process, wherever it is stuck, as soon as its parent has ended."""
    poll = select.poll()
    # No events asked for: told is the end of both directions, not that no more plans will come.
    poll.register(channel, 0)
    # The second test is for a parent whose end of the socket a child of its own inherited.
    while not poll.poll(1000) and os.getppid() == parent_id:
        pass
    os._exit(1)


def main() -> None:
    """A rank's process; its arguments are the descriptor of its socket and its parent's id."""
    descriptor, parent_id = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(fileno=descriptor)
    threading.Thread(target=_end_with_parent, args=(channel, parent_id), daemon=True).start()
    status = 1
    try:
        make_runner, config, checkpoint, rank = channel.receive()
        runner = make_runner(config, checkpoint, rank)
        channel.post(encode(runner.kv_groups))
        # All ranks have the same results; one of them tells.
        serve(runner, channel, reports=rank.index == 0)
        status = 0
    except Exception as error:
        channel.post(encode(Failure.of(error)))
    # Not sys.exit: destructors of a group whose other ranks have ended may wait for ever.
    os._exit(status)
