"""The processes of the ranks: started together, watched, and ended together."""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import fields, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from config import Config
from engine.transport import Close, PlanEncoder, Ring, shared_file
from engine.types import Clock, KVGeometry, StepPlan, StepResult
from engine.worker import Done, Failure, MakeRunner, Rank, Ready, Start
from utils.errors import AllmosError, ConfigError, StepError, WorkerDiedError

if TYPE_CHECKING:
    from utils.checkpoint import Checkpoint

# After the report of a rank that lost another one: how long that one's own may take to come.
_CAUSE_SECONDS = 2.0
# A worker that does not end by itself when asked to is killed after this; the longest step is
# far shorter.
_CLOSE_SECONDS = 30.0
_CODE = "from engine.worker import main; main()"


class WorkerTraceback(Exception):  # noqa: N818 (it is only ever a cause)
    """What a worker printed, as the cause of the error that its parent raises."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f'in the process of rank {rank}:\n"""\n{text}"""')


class Workers:
    """One process per rank. The first failure of any of them ends all.

    Workers end by themselves when this process does, however that happens.

    Args:
        config, checkpoint, make_runner: what every rank runs.
        clock: the runner's in this process, by which results are said to have come.
        num_threads: CPU threads of each.

    Attributes:
        groups: the cache groups of each rank.

    Raises:
        WorkerDiedError: one died while it loaded.
        ConfigError: `config` cannot be sent to another process.
        Exception: whatever a rank raised while it loaded.
    """

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        make_runner: MakeRunner,
        clock: Clock,
        num_threads: int = 1,
    ) -> None:
        self.groups: tuple[KVGeometry, ...]
        self._clock = clock
        self._encode = PlanEncoder()
        self._num_sent = 0
        self._results: dict[int, StepResult] = {}
        self._loaded = False
        self._error: Exception | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._selector = selectors.DefaultSelector()
        size = config.tensor_parallel_size
        with shared_file() as ring, shared_file() as store:
            Ring.allocate(ring, size)
            self._ring = Ring(ring.fileno(), size)
            held = (os.getpid(), self._processes, self._pipes, self._selector, self._ring)
            # Also when this object is forgotten, and when the interpreter ends.
            self._end = weakref.finalize(self, _end, *held)
            config = _of_a_rank(config)
            try:
                for index in range(size):
                    self._spawn(index, ring.fileno(), store.fileno())
                for index, pipe in enumerate(self._pipes):
                    rank = Rank(index, size, f"/dev/fd/{store.fileno()}", num_threads)
                    self._send_start(pipe, Start(rank, config, checkpoint, make_runner))
                self._await_ready()
            except BaseException:
                self._end()
                raise

    @property
    def pids(self) -> list[int]:
        """Process id of each rank."""
        return [process.pid for process in self._processes]

    def send(self, message: StepPlan | Close) -> int:
        """Hand a message to every rank; returns its number, for `result`.

        Raises:
            WorkerDiedError, StepError: a rank failed.
        """
        self._check()
        self._take_in(0)
        try:
            self._ring.send(self._encode(message), wake=self._wake, wait=self._wait_for_room)
            self._num_sent += 1
        except BaseException as error:
            # The ring may hold half a message now.
            self._break(error)
            raise
        return self._num_sent - 1

    def result(self, number: int) -> StepResult:
        """Wait for the result of a step; kept until `forget`.

        Raises:
            WorkerDiedError, StepError: a rank failed.
        """
        while number not in self._results:
            self._check()
            self._take_in(None)
        return self._results[number]

    def forget(self, number: int) -> None:
        """The result has been taken."""
        self._results.pop(number, None)

    def close(self) -> None:
        """End all ranks after what they have under way; may be called twice.

        Raises:
            WorkerDiedError: a rank died instead.
        """
        if not self._end.alive:
            return
        try:
            self.send(Close())
            deadline = time.monotonic() + _CLOSE_SECONDS
            while self._selector.get_map() and time.monotonic() < deadline:
                self._take_in(deadline - time.monotonic(), closing=True)
        finally:
            self._end()

    def _spawn(self, index: int, ring: int, store: int) -> None:
        ours, theirs = Pipe()
        with theirs:
            self._pipes.append(ours)
            self._selector.register(ours, selectors.EVENT_READ, index)
            files = (theirs.fileno(), ring, store)
            process = subprocess.Popen(
                [sys.executable, "-c", _CODE, *map(str, (*files[:2], os.getpid()))],
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                # Ctrl-C is for the parent to handle.
                start_new_session=True,
                env={
                    # All ranks are on this machine; NVLink multicast needs rights that containers
                    # often lack.
                    "NCCL_SOCKET_IFNAME": "lo",
                    "NCCL_NVLS_ENABLE": "0",
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                },
            )
            self._processes.append(process)

    @staticmethod
    def _send_start(pipe: Connection, start: Start) -> None:
        try:
            pipe.send(start)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                "attention_backend",
                start.config.attention_backend,
                f"cannot be sent to the processes of the ranks ({error})",
                'Give a name, "package.module:Class", or a class that a module defines.',
            ) from error
        except OSError:
            pass  # it has ended, as the wait for its answer will tell

    def _await_ready(self) -> None:
        waiting = set(range(len(self._pipes)))
        while waiting:
            for key, _ in self._selector.select():
                match self._message_of(key.data):
                    case Ready(groups):
                        self.groups = groups
                        waiting.discard(key.data)
                    case cause:
                        self._fail(key.data, cause)
        self._loaded = True

    def _check(self) -> None:
        if self._error is not None:
            kind = WorkerDiedError if isinstance(self._error, WorkerDiedError) else StepError
            advice = "close this engine and construct a new one"
            raise kind(f"{self._error}; {advice}") from self._error

    def _break(self, error: BaseException) -> None:
        self._error = self._error or StepError(f"a message was cut short ({error!r})")
        self._end()

    def _wake(self, index: int) -> None:
        with suppress(OSError):  # of one that has ended; the next wait for an answer tells
            self._pipes[index].send_bytes(b"!")

    def _wait_for_room(self) -> None:
        self._take_in(50e-6)

    def _take_in(self, timeout: float | None, *, closing: bool = False) -> None:
        """Wait for messages of any rank and keep the results among them."""
        ready = self._selector.select(timeout)
        try:
            for key, _ in ready:
                match self._message_of(key.data):
                    case Done() as done:
                        self._results[done.number] = done.result(self._clock())
                    case None if closing and self._processes[key.data].wait() == 0:
                        self._selector.unregister(key.fileobj)
                    case cause:
                        self._fail(key.data, cause)
        except BaseException as error:
            # Interrupted in the middle of a message, what follows it would make no sense.
            self._break(error)
            raise

    def _message_of(self, index: int) -> object:
        """A message that waits, or None if the rank has ended."""
        try:
            return self._pipes[index].recv()
        except (EOFError, OSError):
            return None

    def _fail(self, index: int, cause: object) -> None:
        """End all ranks and raise what went wrong in one, or in the one behind its trouble.

        Args:
            cause: its `Failure`, or None if it has died.
        """
        deadline = time.monotonic() + _CAUSE_SECONDS
        seen = {index}
        while isinstance(cause, Failure) and cause.lost_peer and time.monotonic() < deadline:
            for key, _ in self._selector.select(deadline - time.monotonic()):
                message = self._message_of(key.data)
                if key.data in seen:
                    # Its end, after its report.
                    self._selector.unregister(key.fileobj)
                elif message is None or isinstance(message, Failure):
                    index, cause = key.data, message
                    seen.add(index)
        if not isinstance(cause, Failure):
            self._error = self._died(index)
            self._end()
            raise self._error
        self._error = error = cause.error
        if self._loaded and not isinstance(error, AllmosError):
            self._error = StepError(f"{type(error).__name__}: {error}")
        self._end()
        raise self._error from WorkerTraceback(index, cause.traceback)

    def _died(self, index: int) -> WorkerDiedError:
        process = self._processes[index]
        try:
            code = process.wait(1)
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        else:
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            )
        return WorkerDiedError(f"the process of rank {index} (pid {process.pid}) {how}")


def _of_a_rank(config: Config) -> Config:
    """The config without parts that stay here, which need not be fit for sending."""
    kept: dict[str, Any] = {
        field.name: field.default
        for field in fields(config)
        if callable(getattr(config, field.name)) and field.name != "attention_backend"
    }
    return replace(config, **kept)


def _end(
    owner: int,
    processes: list[subprocess.Popen[bytes]],
    pipes: list[Connection],
    selector: selectors.BaseSelector,
    ring: Ring,
) -> None:
    """Kill what still runs, and free what is held here.

    Args:
        owner: id of the process whose workers these are; a fork of it must leave them alone.
    """
    if os.getpid() != owner:
        return
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    selector.close()
    for pipe in pipes:
        pipe.close()
    ring.close()
