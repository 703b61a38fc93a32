"""The tensor-parallel runner: starts, watches and ends one process for each rank."""

from __future__ import annotations

import fcntl
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
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

# Largest number of ranks with which whole requests were compared (docs/exact.md).
_MEASURED_RANKS = 2
# If a collective fails because a rank failed, the runner waits this long for that rank's error.
_CAUSE_SECONDS = 2.0
# After this many seconds `close` kills ranks that have not ended. A step takes much less time.
_CLOSE_SECONDS = 30.0
# While a rank's socket is full, the runner waits up to this time for results, then writes again.
_FULL_SECONDS = 50e-6


class RankTraceback(Exception):  # noqa: N818 (it is only ever a cause)
    """Shows a rank's traceback, as the `__cause__` of the error that the runner then raises."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f'in the process of rank {rank}:\n"""\n{text}"""')


class TensorParallelRunner(ModelRunner):
    """Sends every plan to all ranks. Each rank is a separate process.

    The process of this runner is not a rank. It runs the scheduler, which plans while the ranks
    launch kernels. If any rank fails, all ranks are ended. If this process ends, all ranks end too.

    Args:
        config: config that `engine.parts.resolve` returned. tensor_parallel_size is the rank count.
        make_runner: function that each rank calls in its process, to make its model runner.

    Raises:
        ConfigError: there are too few GPUs, the ranks cannot share the model's heads evenly, or
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
        # What each rank has told of its runner: `exact`, `kv_groups` and `hidden_layers`.
        self._ready: list[tuple[bool, tuple[KVGeometry, ...], int]] = []
        self._codec = PlanCodec()
        # An empty list for each step without a result, oldest step first. `take_in` appends the
        # result. `StepHandle`s instead of lists would make reference cycles with the runner.
        self._pending: deque[list[StepResult]] = deque()
        self._error: Exception | None = None
        self._closed = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._held = ExitStack()
        self._selector = self._held.enter_context(selectors.DefaultSelector())
        # `_end` also runs when this runner is garbage-collected, and when the interpreter exits.
        self._end = weakref.finalize(self, _end, os.getpid(), self._processes, self._held)
        num_threads = max(1, torch.get_num_threads() // size)
        try:
            # Ranks exchange network addresses in this unnamed file, whose descriptor they inherit.
            # It is in memory, and in no folder: /dev/shm may be full, or may not be writable.
            with open(_above_standard(os.memfd_create("ranks")), "wb") as store:
                for index in range(size):
                    rank = Rank(index, size, f"/dev/fd/{store.fileno()}", num_threads)
                    start = _start_message(config, checkpoint, make_runner, rank)
                    self._spawn(index, start, store.fileno())
            while len(self._ready) < size:
                self.take_in(None)
        except BaseException:
            self._end()
            raise
        measured = type(self) is TensorParallelRunner and size <= _MEASURED_RANKS
        self.exact = type(self).exact or (measured and all(one for one, *_ in self._ready))
        self.hidden_layers = self._ready[0][2]

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        """For each cache group, the shape of one rank's KV cache, with only its own KV heads."""
        return self._ready[0][1]

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
            # If only some ranks get the plan, their collectives wait for the other ranks for ever.
            self._break(error)
            raise
        # If Ctrl-C interrupts this loop, the next `execute` or `take_in` sends the unsent bytes.
        while not self._flush():
            self.take_in(_FULL_SECONDS)
        return _Sent(self, arrived)

    def close(self) -> None:
        """Let the ranks finish the steps that were sent, then end all ranks. May be called twice.

        Raises a WorkerDiedError if a rank's process died, but only after all ranks have ended.
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
        """Wait for ranks' messages, at most `timeout` seconds if given; store results of steps.

        Raises:
            WorkerDiedError, StepError: a rank has failed, now or in an earlier call.
            EngineClosedError: `close` has ended the ranks.
        """
        if self._error is not None:
            kind = WorkerDiedError if isinstance(self._error, WorkerDiedError) else StepError
            raise kind(f"{self._error}; close this engine and construct a new one") from self._error
        if not self._end.alive:
            raise EngineClosedError("the runner was closed before the result of the step came")
        if not self._flush():
            # Unsent bytes are sent only after this wait, so the wait must be short.
            timeout = _FULL_SECONDS if timeout is None else min(timeout, _FULL_SECONDS)
        ready = self._selector.select(timeout)
        try:
            for key, _ in ready:
                match self._channels[key.data].receive():
                    case StepResult() as result:
                        self._pending.popleft().append(replace(result, ended_at=self.now()))
                    case (bool(), tuple(), int()) as told:
                        self._ready.append(told)
                    case None if self._closed and self._processes[key.data].wait() == 0:
                        self._selector.unregister(key.fileobj)
                    case cause:
                        self._fail(key.data, cause)
        except BaseException as error:
            # A message may have been read in part. Then later messages cannot be decoded.
            self._break(error)
            raise

    def _flush(self) -> bool:
        """Send unsent bytes to all ranks without waiting; return whether all bytes were sent."""
        written = [channel.flush() for channel in self._channels]
        return all(written)

    def _spawn(self, index: int, start: bytes, store: int) -> None:
        ends = socket.socketpair()
        ours, theirs = (_above_standard(end.detach()) for end in ends)
        channel = self._held.enter_context(Channel(fileno=ours))
        self._channels.append(channel)
        self._selector.register(channel, selectors.EVENT_READ, index)
        # A rank finds the engine first, then what is in absolute paths. Relative paths come last,
        # such as "": the current directory may have changed since the engine was imported.
        root = str(Path(__file__).parents[2])
        paths = sys.path if root in sys.path else [root, *sys.path]
        paths = [os.path.abspath(path) for path in sorted(paths, key=os.path.isabs, reverse=True)]
        code = f"import sys; sys.path[:] = {paths}; from engine.ranks.worker import main; main()"
        with open(theirs, "wb"):
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs), str(os.getpid())],
                pass_fds=(theirs, store),
                stdin=subprocess.DEVNULL,
                stdout=_inherited(1),
                stderr=_inherited(2),
                # Ctrl-C does not reach a rank in a new session. Only this process handles Ctrl-C.
                start_new_session=True,
                env={
                    # All ranks are on one machine, so NCCL needs only the loopback interface.
                    "NCCL_SOCKET_IFNAME": "lo",
                    # Switches off NVLink multicast, which needs rights that containers often lack.
                    "NCCL_NVLS_ENABLE": "0",
                    **os.environ,
                },
            )
        self._processes.append(self._held.enter_context(process))
        channel.post(start)

    def _break(self, error: BaseException) -> None:
        """End all ranks. After this, `take_in` always raises, with the first error as the cause."""
        if self._error is None:
            cut_short = StepError(f"a message was cut short ({error!r})")
            self._error = error if isinstance(error, AllmosError) else cut_short
        self._end()

    def _fail(self, index: int, cause: object) -> NoReturn:
        """Raise the error of rank `index`, or of another rank whose failure caused that error.

        cause: last message of rank `index`: a `Failure`, or None if the rank's process died.
        """
        deadline = time.monotonic() + _CAUSE_SECONDS
        # Without this, every later `select` would return the socket of the ended rank as ready.
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
    runner: TensorParallelRunner
    arrived: list[StepResult]  # empty until `take_in` appends the step's result

    def result(self) -> StepResult:
        while not self.arrived:
            self.runner.take_in(None)
        return self.arrived[0]


def _above_standard(descriptor: int) -> int:
    """Return the descriptor with a number above 2, where no output to stdout or stderr can go.

    Without this, a process that has closed its standard streams would reuse their numbers.
    """
    with open(descriptor, "wb"):
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)


def _inherited(number: int) -> int | None:
    """Return Popen's argument for standard stream `number`: None if the stream can be inherited."""
    with suppress(OSError):
        if os.get_inheritable(number):
            return None
    return subprocess.DEVNULL


def _start_message(
    config: Config, checkpoint: Checkpoint, make_runner: MakeRunner, rank: Rank
) -> bytes:
    """Return the first message to a rank, with all that the rank needs to make its runner."""
    # Pickle may refuse callables. Callable options that ranks do not use are set to their defaults.
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
    """Kill the ranks and close `held`; do nothing in a forked copy of process `owner`."""
    if os.getpid() == owner:
        for process in processes:
            process.kill()
        held.close()
