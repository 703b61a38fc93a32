"""The tensor-parallel runner: starts, watches and ends one process for each rank."""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from config import Config
from engine.ranks.channel import Channel, PlanCodec, encode
from engine.ranks.collectives import check_divides, local_rank
from engine.ranks.worker import Failure, MakeRunner, Rank
from engine.types import KVGeometry, ModelRunner, StepHandle, StepPlan, StepResult
from utils.checkpoint import Checkpoint
from utils.errors import AllmosError, ConfigError, EngineClosedError, StepError, WorkerDiedError

# If a collective failed because a rank failed, the runner waits this long for that rank's error.
_CAUSE_SECONDS = 2.0
# `close` kills ranks that have not ended after this many seconds. No step takes that long.
_CLOSE_SECONDS = 30.0
# While a rank's socket is full, the runner waits for results for this time before it writes again.
_FULL_SECONDS = 50e-6


class RankTraceback(Exception):  # noqa: N818 (it is only ever a cause)
    """`__cause__` of the error that the runner raises if a rank fails; holds its traceback."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f'in the process of rank {rank}:\n"""\n{text}"""')


class TensorParallelRunner(ModelRunner):
    """Sends every plan to all ranks. Each rank is a separate process.

    The process of this runner is not a rank, so the scheduler plans while the ranks' processes
    launch kernels. If any rank fails, all ranks are ended. If this process ends, all ranks end too.

    Args:
        config: config that `engine.parts.resolve` returned. tensor_parallel_size is the rank count.
        make_runner: function that makes a rank's runner; called in the process of each rank.

    Raises:
        ConfigError: there are too few devices, the model's heads do not divide by the ranks, or
            `config` cannot be sent to another process.
        WorkerDiedError: a rank's process ended while it loaded the model.
        Exception: any error that a rank raised while it loaded the model.
    """

    name = "tensor_parallel"

    def __init__(
        self, config: Config, checkpoint: Checkpoint, make_runner: MakeRunner = local_rank
    ) -> None:
        size = config.tensor_parallel_size
        if getattr(make_runner, "func", make_runner) is local_rank:
            check_divides(config, checkpoint)
        self._ready: list[tuple[KVGeometry, ...]] = []
        self._codec = PlanCodec()
        # One list for each sent step, oldest first. `take_in` appends a step's result to its list.
        # Handles are not stored here: a handle refers to the runner, which makes a reference cycle.
        self._pending: deque[list[StepResult]] = deque()
        self._error: Exception | None = None
        self._closed = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._held = ExitStack()
        self._selector = self._held.enter_context(selectors.DefaultSelector())
        # `_end` also runs when this object is garbage-collected and when the interpreter exits.
        self._end = weakref.finalize(self, _end, os.getpid(), self._processes, self._held)
        num_threads = max(1, torch.get_num_threads() // size)
        memory = Path("/dev/shm")
        try:
            # The ranks exchange addresses in this unnamed file, whose descriptor they inherit.
            with tempfile.TemporaryFile(dir=memory if memory.is_dir() else None) as store:
                for index in range(size):
                    rank = Rank(index, size, f"/dev/fd/{store.fileno()}", num_threads)
                    start = _start_message(config, checkpoint, make_runner, rank)
                    self._spawn(index, start, store.fileno())
            while len(self._ready) < size:
                self.take_in(None)
        except BaseException:
            self._end()
            raise

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        """Geometries of the cache groups on one rank, which has a share of the KV heads."""
        return self._ready[0]

    def execute(self, plan: StepPlan) -> StepHandle:
        if self._closed:
            raise EngineClosedError("execute() after close()")
        self.take_in(0)
        arrived: list[StepResult] = []
        try:
            self._pending.append(arrived)
            message = self._codec.encode(plan)
            for channel in self._channels:
                channel.queue(message)
        except BaseException as error:
            # If only some ranks get the plan, they wait for the other ranks for ever.
            self._break(error)
            raise
        # If Ctrl-C interrupts this loop, the next `execute` or `take_in` writes the rest.
        while not self._flush():
            self.take_in(_FULL_SECONDS)
        return _Sent(self, arrived)

    def close(self) -> None:
        """Let the ranks finish the steps that were sent, then end all ranks. May be called twice.

        If a rank's process died, a WorkerDiedError is raised after all ranks have ended.
        """
        self._closed = True
        if not self._end.alive:
            return
        try:
            deadline = time.monotonic() + _CLOSE_SECONDS
            while not self._flush() and time.monotonic() < deadline:
                self.take_in(_FULL_SECONDS)
            for channel in self._channels:
                channel.shutdown(socket.SHUT_WR)
            while self._selector.get_map() and (left := deadline - time.monotonic()) > 0:
                self.take_in(left)
        finally:
            self._end()

    def take_in(self, timeout: float | None) -> None:
        """Wait at most `timeout` seconds (None: no limit) for messages; store results in handles.

        Raises:
            WorkerDiedError, StepError: a rank has failed.
            EngineClosedError: all ranks have ended.
        """
        if self._error is not None:
            kind = WorkerDiedError if isinstance(self._error, WorkerDiedError) else StepError
            raise kind(f"{self._error}; close this engine and construct a new one") from self._error
        if not self._end.alive:
            raise EngineClosedError("the runner was closed before the result of the step came")
        if not self._flush():
            # The rest of a message is written only after this wait, so the wait must be short.
            timeout = _FULL_SECONDS if timeout is None else min(timeout, _FULL_SECONDS)
        ready = self._selector.select(timeout)
        try:
            for key, _ in ready:
                match self._channels[key.data].receive():
                    case StepResult() as result:
                        self._pending.popleft().append(replace(result, ended_at=self.now()))
                    case tuple() as kv_groups:
                        self._ready.append(kv_groups)
                    case None if self._closed and self._processes[key.data].wait() == 0:
                        self._selector.unregister(key.fileobj)
                    case cause:
                        self._fail(key.data, cause)
        except BaseException as error:
            # A message may be half read after an interruption. Later messages are then unreadable.
            self._break(error)
            raise

    def _flush(self) -> bool:
        """Write queued messages to all ranks without waiting. Returns whether all are written."""
        written = [channel.flush() for channel in self._channels]
        return all(written)

    def _spawn(self, index: int, start: bytes, store: int) -> None:
        ours, theirs = socket.socketpair()
        channel = self._held.enter_context(Channel(fileno=ours.detach()))
        self._channels.append(channel)
        self._selector.register(channel, selectors.EVENT_READ, index)
        # `python -c` puts the current directory first in sys.path. `code` deletes this entry.
        code = "import sys; del sys.path[:1]; from engine.ranks.worker import main; main()"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(), store),
                stdin=subprocess.DEVNULL,
                # In a new session, Ctrl-C does not reach the rank. This process handles Ctrl-C.
                start_new_session=True,
                env={
                    # All ranks are on this machine: NCCL needs only the loopback interface.
                    "NCCL_SOCKET_IFNAME": "lo",
                    # NCCL's NVLink multicast needs rights that containers often lack.
                    "NCCL_NVLS_ENABLE": "0",
                    **os.environ,
                    # With PYTHONSAFEPATH, `python -c` would not add the entry that `code` deletes.
                    "PYTHONSAFEPATH": "",
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                },
            )
        # Closing `_held` waits until the process has ended.
        self._processes.append(self._held.enter_context(process))
        channel.post(start)

    def _break(self, error: BaseException) -> None:
        """End all ranks. Later calls of `take_in` raise the first error passed here."""
        if self._error is None:
            cut_short = StepError(f"a message was cut short ({error!r})")
            self._error = error if isinstance(error, AllmosError) else cut_short
        self._end()

    def _fail(self, index: int, cause: object) -> NoReturn:
        """Raise the error of rank `index`, or of another rank whose end caused that error.

        `cause` is the last message of the rank: a `Failure`, or None if the rank's process died.
        """
        deadline = time.monotonic() + _CAUSE_SECONDS
        # Without this call, every later `select` would report the ended rank's socket as ready.
        self._selector.unregister(self._channels[index])
        while isinstance(cause, Failure) and cause.lost_peer and time.monotonic() < deadline:
            for key, _ in self._selector.select(deadline - time.monotonic())[:1]:
                message = self._channels[key.data].receive()
                if message is None or isinstance(message, Failure):
                    index, cause = key.data, message
                    self._selector.unregister(key.fileobj)
        if not isinstance(cause, Failure):
            raise _died(index, self._processes[index])
        error = cause.error
        if len(self._ready) == len(self._channels) and not isinstance(error, AllmosError):
            error = StepError(f"{type(error).__name__}: {error}")
        raise error from RankTraceback(index, cause.traceback)


@dataclass(slots=True, eq=False)
class _Sent(StepHandle):
    """Handle of a step that was sent to the ranks."""

    runner: TensorParallelRunner
    arrived: list[StepResult]  # empty until `take_in` appends the result

    def result(self) -> StepResult:
        while not self.arrived:
            self.runner.take_in(None)
        return self.arrived[0]


def _start_message(
    config: Config, checkpoint: Checkpoint, make_runner: MakeRunner, rank: Rank
) -> bytes:
    """Return a rank's first message, with all that the rank needs to make its runner."""
    # Pickle may refuse callables. So options that ranks do not use are reset if they are callables.
    kept: dict[str, Any] = {
        field.name: field.default
        for field in fields(config)
        if callable(getattr(config, field.name)) and field.name != "attention_backend"
    }
    try:
        return encode((make_runner, replace(config, **kept), checkpoint, rank))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        problem = f"cannot be sent to the processes of the ranks ({error})"
        fix = 'Give a name, "package.module:Class", or a class that a module defines.'
        culprit = "attention_backend" if callable(config.attention_backend) else "model_runner"
        raise ConfigError(culprit, getattr(config, culprit), problem, fix) from error


def _died(index: int, process: subprocess.Popen[bytes]) -> WorkerDiedError:
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    if process.returncode is None:
        how = "closed its connection"
    elif process.returncode < 0:
        how = f"was killed by {signal.Signals(-process.returncode).name}"
    else:
        how = f"exited with {process.returncode}"
    return WorkerDiedError(f"the process of rank {index} (pid {process.pid}) {how}")


def _end(owner: int, processes: list[subprocess.Popen[bytes]], held: ExitStack) -> None:
    """Kill the ranks and close `held`. In a forked child of the process `owner`, do nothing."""
    if os.getpid() == owner:
        for process in processes:
            process.kill()
        held.close()
