"""The process of a rank, which runs plans that the parent process's TensorParallelRunner sends."""

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

# After a step, a rank polls its channel for this many seconds; the next plan usually comes sooner.
# If none comes, the rank sleeps until a plan arrives, since polling would burden an idle machine.
_SPIN_SECONDS = 500e-6


@dataclass(frozen=True, slots=True)
class Rank:
    """Data from the runner that a rank's process needs, besides the config and the checkpoint."""

    index: int
    size: int
    store: str  # path of the file in which the ranks exchange network addresses
    num_threads: int  # number of CPU threads that torch may use


# Type of the function that makes a rank's model runner. Pickle sends it to ranks as an import path.
MakeRunner = Callable[[Config, "Checkpoint", Rank], ModelRunner]


class LostPeerError(Exception):
    """A collective failed because another rank failed. The other rank sends its own error."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The last message of a rank that ends because of an error."""

    error: Exception
    traceback: str  # the error's traceback, as Python prints it
    lost_peer: bool  # whether `error` or one of its causes is a LostPeerError

    @staticmethod
    def of(error: Exception) -> Failure:
        text = "".join(traceback.format_exception(error))
        cause: BaseException | None = error
        seen: set[int] = set()
        while cause is not None and not isinstance(cause, LostPeerError):
            seen.add(id(cause))
            cause = cause.__cause__ or cause.__context__
            # The chain of __cause__ and __context__ may return to an error that was seen before.
            cause = None if id(cause) in seen else cause
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # pickling an exception may run a user's code, which may raise anything
            error = StepError(f"{type(error).__name__}: {error}")
        return Failure(error, text, lost_peer=cause is not None)


def serve(runner: ModelRunner, channel: Channel, *, reports: bool) -> None:
    """Run plans until the parent process closes the channel, then close the runner.

    If `reports` is True, results are sent to the parent process. If `execute` does not wait for the
    end of a step, a plan that arrives during a step is launched at once.
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
    """End this process when the parent process has ended, even if the main thread hangs."""
    poll = select.poll()
    # With event mask 0, poll reports a socket only once both directions are closed. After the last
    # plan the parent closes one direction, and this process must still finish its steps.
    poll.register(channel, 0)
    # Check the parent's id too, as a child of the parent may keep an inherited socket open.
    while not poll.poll(1000) and os.getppid() == parent_id:
        pass
    os._exit(1)


def main() -> None:
    """Run a rank's process. sys.argv has the socket's descriptor and the parent's process id."""
    descriptor, parent_id = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(fileno=descriptor)
    threading.Thread(target=_end_with_parent, args=(channel, parent_id), daemon=True).start()
    status = 1
    try:
        make_runner, config, checkpoint, rank = channel.receive()
        runner = make_runner(config, checkpoint, rank)
        channel.post(encode((runner.exact, runner.kv_groups, runner.hidden_layers)))
        # All ranks compute equal results, so only rank 0 sends results.
        serve(runner, channel, reports=rank.index == 0)
        status = 0
    except Exception as error:
        channel.post(encode(Failure.of(error)))
    # sys.exit would destroy the torch process group, which may wait for ended ranks for ever.
    os._exit(status)
