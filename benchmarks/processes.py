"""Engines in processes of their own.

The caller sends an engine's name and its setting, then one request after the other; every answer
is a value of one of the types below.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.engines import ENGINES, Engine, Setting, Tokens, Trace
from benchmarks.latency import Latency
from benchmarks.workloads import Workload

_ROOT = Path(__file__).parents[1]
_CLOSE_SECONDS = 30.0
_SERVE = "import sys; from benchmarks.processes import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True)
class Ready:
    """The engine is there, `seconds` of construction and its imports."""

    seconds: float


@dataclass(frozen=True)
class Run:
    """Serve the workload."""

    work: Workload


@dataclass(frozen=True)
class Watch:
    """Serve the workload with its steps watched; no runs are to follow."""

    work: Workload


@dataclass(frozen=True)
class Ran:
    """A run.

    Attributes:
        seconds: wall time.
        peak_host_bytes: the most host memory the process has held.
        latencies: of each request, if the engine tells.
    """

    seconds: float
    outputs: Tokens
    peak_host_bytes: int
    latencies: list[Latency] | None = None


@dataclass(frozen=True)
class Failed:
    """The engine raised."""

    problem: str
    traceback: str


class EngineFailedError(Exception):
    """An engine could not be started, or failed on the way."""


class EngineProcess:
    """One engine in a process of its own.

    Attributes:
        startup_seconds: from the start of the process to a constructed engine.
        construct_seconds: the share of the engine's own imports and construction.

    Raises:
        EngineFailedError: it does not start.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        start = time.perf_counter()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=_ROOT,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                # What engines print goes to stderr: stdout is for the figures.
                stdout=2,
            )
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        ready = self._ask((name, setting))
        self.startup_seconds = time.perf_counter() - start
        self.construct_seconds: float = ready.seconds

    def run(self, work: Workload) -> Ran:
        """Serve a workload.

        Raises:
            EngineFailedError: the engine raised, or its process has ended.
        """
        ran: Ran = self._ask(Run(work))
        return ran

    def watch(self, work: Workload) -> Trace | None:
        """Serve a workload with its steps watched, after all runs; None if it cannot be.

        Raises:
            EngineFailedError: as `run`.
        """
        trace: Trace | None = self._ask(Watch(work))
        return trace

    def close(self) -> None:
        """End the process; may be called twice."""
        self._connection.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, message: object) -> Any:
        try:
            self._connection.send(message)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise EngineFailedError(
                f"its process ended with exit code {self._process.returncode}"
            ) from error
        if isinstance(answer, Failed):
            self.close()
            sys.stderr.write(answer.traceback)
            raise EngineFailedError(answer.problem)
        return answer


def peak_host_bytes() -> int:
    """The most memory this process has held."""
    # Not getrusage: on Linux its figure starts with the peak of the process that forked this one.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def serve(descriptor: int) -> None:
    """Construct the engine that the caller behind a socket names and answer until it hangs up."""
    connection: Connection[Any, Any] = Connection(descriptor)
    try:
        name, setting = connection.recv()
        start = time.perf_counter()
        engine = _construct(name, setting)
        connection.send(Ready(time.perf_counter() - start))
        while True:
            connection.send(_answer(engine, connection.recv()))
    except EOFError:
        return
    except Exception as error:
        # The caller may be gone.
        with suppress(OSError):
            connection.send(Failed(f"{type(error).__name__}: {error}", traceback.format_exc()))


def _construct(name: str, setting: Setting) -> Engine:
    if setting.threads:
        import torch

        torch.set_num_threads(setting.threads)
    return ENGINES[name](setting)


def _answer(engine: Engine, message: object) -> object:
    match message:
        case Run(work):
            start = time.perf_counter()
            outputs = engine.generate(work)
            seconds = time.perf_counter() - start
            return Ran(seconds, outputs, peak_host_bytes(), engine.latencies())
        case Watch(work):
            return engine.trace(work)
    raise TypeError(f"unknown message {message!r}")
