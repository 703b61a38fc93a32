"""The runner of several ranks: their processes start together, are watched, and end together."""

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

# A rank tells that it has lost another one: how long the other one's own report may take to come.
_CAUSE_SECONDS = 2.0
# A rank that does not end when asked to is killed after this; the longest step is far shorter.
_CLOSE_SECONDS = 30.0
# How long to wait for results while the socket of a rank is full, before looking again.
_FULL_SECONDS = 50e-6


class RankTraceback(Exception):  # noqa: N818 (it is only ever a cause)
    """What a rank printed, as the cause of the error that its runner raises."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f'in the process of rank {rank}:\n"""\n{text}"""')


class TensorParallelRunner(ModelRunner):
    """Sends every plan to one process per rank; none of them is the process that schedules.

    So planning overlaps with what the ranks do on the host. The first failure of any rank ends all
    of them. The ranks end by themselves when this process does, however that happens.

    Args:
        config: resolved; tensor_parallel_size says how many ranks.
        make_runner: called in each process to make its runner.

    Raises:
        ConfigError: there are too few devices, the model's heads do not divide by the ranks, or
            `config` cannot be sent to another process.
        WorkerDiedError: a rank's process ended while it loaded.
        Exception: whatever a rank raised while it loaded.
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
        # Of each step under way, oldest first: the list that gets its result. Handles hold this
        # object, so it does not hold them.
        self._pending: deque[list[StepResult]] = deque()
        self._error: Exception | None = None
        self._closed = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._held = ExitStack()
        self._selector = self._held.enter_context(selectors.DefaultSelector())
        # Called also when this object is forgotten, and when the interpreter ends.
        self._end = weakref.finalize(self, _end, os.getpid(), self._processes, self._held)
        num_threads = max(1, torch.get_num_threads() // size)
        memory = Path("/dev/shm")
        try:
            # A file without a name, preferably in memory; the ranks inherit its descriptor.
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
        """Of each rank: its share of the KV heads."""
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
            # Some ranks have the plan and others do not.
            self._break(error)
            raise
        # Interrupted here, the next call goes on.
        while not self._flush():
            self.take_in(_FULL_SECONDS)
        return _Sent(self, arrived)

    def close(self) -> None:
        """End all ranks after what they have under way; may be called twice.

        If a rank died instead, a WorkerDiedError is raised once nothing is left of any.
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
        """Wait `timeout` seconds (None: for ever) for messages of any rank; keep the results.

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
            # The ranks may be waiting for the rest of a message.
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
            # Interrupted in the middle of a message, what follows it would make no sense.
            self._break(error)
            raise

    def _flush(self) -> bool:
        """Write what the ranks' sockets take; False if something is left."""
        written = [channel.flush() for channel in self._channels]
        return all(written)

    def _spawn(self, index: int, start: bytes, store: int) -> None:
        ours, theirs = socket.socketpair()
        channel = self._held.enter_context(Channel(fileno=ours.detach()))
        self._channels.append(channel)
        self._selector.register(channel, selectors.EVENT_READ, index)
        # -c puts the current directory first, which the parent's path need not have.
        code = "import sys; del sys.path[:1]; from engine.ranks.worker import main; main()"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(), store),
                stdin=subprocess.DEVNULL,
                # Ctrl-C is for the parent to handle.
                start_new_session=True,
                env={
                    # All ranks are on this machine.
                    "NCCL_SOCKET_IFNAME": "lo",
                    # NVLink multicast needs rights that containers often lack.
                    "NCCL_NVLS_ENABLE": "0",
                    **os.environ,
                    # It would keep -c from putting the current directory there.
                    "PYTHONSAFEPATH": "",
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                },
            )
        # Waits for the process.
        self._processes.append(self._held.enter_context(process))
        channel.post(start)

    def _break(self, error: BaseException) -> None:
        """End all ranks; `error` is the reason, unless there was one before."""
        if self._error is None:
            cut_short = StepError(f"a message was cut short ({error!r})")
            self._error = error if isinstance(error, AllmosError) else cut_short
        self._end()

    def _fail(self, index: int, cause: object) -> NoReturn:
        """Raise a rank's failure, or that of another rank if it was the reason.

        A `cause` that is no `Failure` tells that the rank has died.
        """
        deadline = time.monotonic() + _CAUSE_SECONDS
        # Behind its report comes nothing but its end.
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
    """A step that the ranks run."""

    runner: TensorParallelRunner
    arrived: list[StepResult]  # what `take_in` appends to

    def result(self) -> StepResult:
        while not self.arrived:
            self.runner.take_in(None)
        return self.arrived[0]


def _start_message(
    config: Config, checkpoint: Checkpoint, make_runner: MakeRunner, rank: Rank
) -> bytes:
    """What a rank has to run, without the parts that stay here: they need not be picklable."""
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
        raise ConfigError("attention_backend", config.attention_backend, problem, fix) from error


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
    """Kill what still runs, and free what is held; a fork of `owner` must do neither."""
    if os.getpid() == owner:
        for process in processes:
            process.kill()
        held.close()
