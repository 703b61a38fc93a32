"""Lets many threads use one engine: one thread at a time has the *turn*, the others wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident

from utils.errors import EngineUseError

# A waiting thread looks again after this many seconds. It is woken when a turn ends, unless
# Ctrl-C interrupts the thread whose turn ends.
_LOOK_SECONDS = 0.5


class Turns:
    """Hands the turn from thread to thread.

    A thread takes the turn for a short call (`turn`), or to run steps until its own requests have
    results (`until`). Short calls come first. Before a step begins, all threads that wait for
    results which the last step brought have left. So no stream gets ahead of another.

    Args:
        between: function that is called at the beginning and at the end of every turn.
    """

    def __init__(self, between: Callable[[], None]) -> None:
        self._between = between
        self._changed = threading.Condition(threading.Lock())
        self._owner: int | None = None  # id of the thread that has the turn
        self._short: set[int] = set()  # ids of the threads that wait for the turn in `turn`
        self._waiting: dict[int, Callable[[], bool]] = {}  # thread id -> `done`, in `until`
        self._outside: set[int] = set()  # ids of the threads that run functions of the user
        self._process = os.getpid()

    @property
    def is_foreign(self) -> bool:
        """Whether this process is a forked child of the process that made the engine."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Raise EngineUseError in a forked child."""
        if self.is_foreign:
            raise EngineUseError(
                "the engine belongs to the process that made it, and this is a forked child of it; "
                "construct an engine in this process"
            )

    def check(self) -> None:
        """Raise EngineUseError in a forked child, and in a function that the engine has called."""
        self.check_process()
        if self._owner == get_ident() or get_ident() in self._outside:
            raise EngineUseError(
                "the engine is running this function, so the function cannot call the engine; "
                "call it after the step, or from another thread"
            )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turn, and keep it for a short call. Raises EngineUseError (see `check`)."""
        self.check()
        me = get_ident()
        try:
            with self._changed:
                self._short.add(me)
                while self._owner is not None:
                    self._changed.wait(_LOOK_SECONDS)
                self._owner = me
            self._between()
            yield
        finally:
            self._short.discard(me)
            self._leave(me)

    @contextmanager
    def until(self, done: Callable[[], bool]) -> Iterator[bool]:
        """Wait until `done()` is True or a step may begin. Yields whether this thread may step.

        No other thread may step before the `with` block ends or makes `done()` False again. So the
        block can read what `done` is about. Other threads call `done` too. Raises EngineUseError.
        """
        self.check()
        me = get_ident()
        try:
            with self._changed:
                self._waiting[me] = done
                while not done():
                    if self._may_step():
                        self._owner = me
                        break
                    self._changed.wait(_LOOK_SECONDS)
            if self._owner == me:
                self._between()
            yield self._owner == me
        finally:
            self._waiting.pop(me, None)
            self._leave(me)

    @contextmanager
    def attempt(self) -> Iterator[bool]:
        """Take the turn if no thread has it. Yields whether this thread has the turn. Never waits.

        A finalizer may call this in any thread at any time, also inside the methods above.
        """
        me, free = get_ident(), False
        try:
            if self._changed.acquire(blocking=False):
                try:
                    if free := self._owner is None:
                        self._owner = me
                finally:
                    self._changed.release()
            yield free
        finally:
            if free:
                self._leave(me)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Context manager for code of the user that a step runs: the code cannot take the turn."""
        me = get_ident()
        new = me not in self._outside
        self._outside.add(me)
        try:
            yield
        finally:
            if new:
                self._outside.discard(me)

    def _may_step(self) -> bool:
        return self._owner is None and not self._short and not self._have_results()

    def _have_results(self) -> bool:
        return any(done() for done in self._waiting.values())

    def _leave(self, me: int) -> None:
        had_turn = self._owner == me
        try:
            if had_turn:
                self._between()
        finally:
            if had_turn:
                self._owner = None
            # A thread that waits enters `_short` or `_waiting` before it looks at `_owner`.
            if self._short or self._waiting:
                self._wake(had_turn)

    def _wake(self, had_turn: bool) -> None:
        with self._changed:
            # One thread is enough to run the next step. To wake a thread takes some 10 us.
            if self._short or (had_turn and self._have_results()):
                self._changed.notify_all()
            elif not self._have_results():
                self._changed.notify()
