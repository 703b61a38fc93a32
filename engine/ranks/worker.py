"""A rank's process: receives plans, runs them, sends results. This module does not import torch."""

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

# A rank without work polls its channel for this time before it sleeps. The time is longer than the
# pause between two steps, and short enough not to burden an idle machine.
_SPIN_SECONDS = 500e-6


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank's index, the number of ranks, and resources of the rank's process."""

    index: int
    size: int
    store: str  # path of the file through which the ranks find each other
    num_threads: int  # CPU threads that torch may use in this rank


# Function that makes a rank's runner. The rank's process must be able to import the function.
MakeRunner = Callable[[Config, "Checkpoint", Rank], ModelRunner]


class LostPeerError(Exception):
    """A collective failed because another rank failed. The other rank's report tells the cause."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The last message of a rank that raised an error."""

    error: Exception
    traceback: str  # as Python prints it
    lost_peer: bool  # whether another rank's end caused the error

    @staticmethod
    def of(error: Exception) -> Failure:
        """Make the report of an exception that is being handled."""
        text = "".join(traceback.format_exception(error))
        cause: BaseException | None = error
        seen: set[int] = set()
        while cause is not None and not isinstance(cause, LostPeerError):
            seen.add(id(cause))
            cause = cause.__cause__ or cause.__context__
            # The chain of causes may be a cycle.
            cause = None if id(cause) in seen else cause
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # pickling a user's exception class may raise anything
            error = StepError(f"{type(error).__name__}: {error}")
        return Failure(error, text, lost_peer=cause is not None)


def serve(runner: ModelRunner, channel: Channel, *, reports: bool) -> None:
    """Run plans until the channel ends, then close the runner; send results if `reports` is true.

    The next plan is launched while a step runs, unless `done` of the step's handle is always True.
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
    # With event mask 0, poll reports only that both directions are closed. The parent closes one
    # direction after the last plan, and this process must then go on.
    poll.register(channel, 0)
    # If a child of the parent inherited the parent's socket, only getppid shows the parent's end.
    while not poll.poll(1000) and os.getppid() == parent_id:
        pass
    os._exit(1)


def main() -> None:
    """Run a rank's process; the arguments are its socket's descriptor and its parent's id."""
    descriptor, parent_id = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(fileno=descriptor)
    threading.Thread(target=_end_with_parent, args=(channel, parent_id), daemon=True).start()
    status = 1
    try:
        make_runner, config, checkpoint, rank = channel.receive()
        runner = make_runner(config, checkpoint, rank)
        channel.post(encode(runner.kv_groups))
        # All ranks have the same results, so only rank 0 sends them.
        serve(runner, channel, reports=rank.index == 0)
        status = 0
    except Exception as error:
        channel.post(encode(Failure.of(error)))
    # sys.exit would run the process group's destructors, which may wait for ended ranks for ever.
    os._exit(status)
