"""Lets many threads use one engine: one thread at a time has the *turn*, the others wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from threading import get_ident
from typing import Any

from utils.errors import EngineUseError

# A waiting thread looks again after this many seconds. It is woken when a turn ends, unless
# Ctrl-C interrupts the thread whose turn ends.
_LOOK_SECONDS = 0.5


@dataclass(slots=True, eq=False)
class _Waiter:
    """A thread that waits. It sleeps until its `bell`, a lock that is taken, is released."""

    done: Callable[[], bool] | None  # None: waits for a short call
    wants_step: bool = False  # waits to run a step, whatever the step brings
    bell: Any = field(default_factory=threading.Lock)


class Turns:
    """Hands the turn from thread to thread.

    A thread takes the turn for a short call (`turn`), for a step (`step`), or to run steps until
    its own requests have results (`until`). Threads get the turn in this order, and in the order of
    their arrival in `step`. Before a step begins, all threads that wait for results which the last
    step brought have left. So no stream gets ahead of another.

    Ctrl-C may raise KeyboardInterrupt in the main thread after any call. So a turn ends by an
    assignment, and the lock is one whose `with` statement cannot be interrupted half-way; that of
    `threading.Condition` can. Signal handlers and finalizers may call these methods in the middle
    of each other, so the lock is reentrant.

    Args:
        between: function that is called at the beginning and at the end of every turn.
    """

    def __init__(self, between: Callable[[], None]) -> None:
        self._between = between
        self._lock = threading.RLock()
        self._owner: int | None = None  # id of the thread that has the turn
        self._waiting: dict[int, _Waiter] = {}  # by thread id
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
        """Raise EngineUseError in a forked child, and in a function that the engine has called.

        Also in a signal handler that interrupts the engine at a point where it cannot wait.
        """
        self.check_process()
        busy = self._owner == get_ident() or get_ident() in self._outside
        # RLock has this method for `threading.Condition`, which uses it for the same question.
        if busy or self._lock._is_owned():  # type: ignore[attr-defined]
            raise EngineUseError(
                "the engine is running this function, so the function cannot call the engine; "
                "call it after the step"
            )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turn, and keep it for a short call. Raises EngineUseError (see `check`)."""
        with self._turn(_Waiter(None)):
            yield

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wait until a step may begin, and keep the turn for the step. Raises EngineUseError."""
        with self._turn(_Waiter(lambda: False, wants_step=True)):
            yield

    @contextmanager
    def until(self, done: Callable[[], bool]) -> Iterator[bool]:
        """Wait until `done()` is True or a step may begin. Yields whether this thread may step.

        No other thread may step before the `with` block ends or makes `done()` False again. So the
        block can read what `done` is about. Other threads call `done` too. Raises EngineUseError.
        """
        with self._turn(_Waiter(done)) as mine:
            yield mine

    @contextmanager
    def _turn(self, waiter: _Waiter) -> Iterator[bool]:
        self.check()
        me = get_ident()
        outer = self._waiting.get(me)  # of the call that a signal handler interrupts
        try:
            self._wait(me, waiter)
            mine = self._owner == me
            if mine:
                self._between()
            try:
                yield mine
            finally:
                if mine:
                    self._between()
        finally:
            had_turn = self._owner == me
            if had_turn:
                self._owner = None
            if outer is None:
                self._waiting.pop(me, None)
            else:
                self._waiting[me] = outer
            # A thread enters `_waiting` before it reads `_owner`. So a thread either sees that the
            # turn is free, or is woken here.
            if self._waiting:
                self._wake(had_turn)

    def _wait(self, me: int, waiter: _Waiter) -> None:
        """Wait until the waiter's results are there, or take the turn."""
        self._waiting[me] = waiter
        waiter.bell.acquire()
        while True:
            with self._lock:
                if waiter.done is not None and waiter.done():
                    return
                if self._owner is None and (waiter.done is None or self._may_step(waiter)):
                    self._owner = me
                    return
            waiter.bell.acquire(timeout=_LOOK_SECONDS)

    def _may_step(self, waiter: _Waiter) -> bool:
        waiting = list(self._waiting.values())
        if any(one.done is None or one.done() for one in waiting):
            return False
        return next((one for one in waiting if one.wants_step), waiter) is waiter

    def _wake(self, had_turn: bool) -> None:
        with self._lock:
            waiting = list(self._waiting.values())
            ready = (one for one in waiting if one.done is None or one.done())
            # Only the thread that had the turn wakes all of them. Each thread leaves after a step,
            # so a look at all others would cost the square of the number of threads.
            first = list(ready if had_turn else islice(ready, 1))
            # If this thread had the turn, wake all threads that need no step: nobody else does. If
            # there are none, wake one thread to run the next step. To wake one takes some 10 us.
            next_step = [one for one in waiting if one.wants_step] or waiting
            for one in (first if had_turn else []) or ([] if first else next_step[:1]):
                with suppress(RuntimeError):  # the bell is released already
                    one.bell.release()

    @contextmanager
    def attempt(self) -> Iterator[bool]:
        """Take the turn if no thread has it. Yields whether this thread has the turn. Never waits.

        A finalizer may call this in any thread at any time, also inside the methods above.
        """
        me, free = get_ident(), False
        try:
            with self._lock:
                if free := self._owner is None:
                    self._owner = me
            yield free
        finally:
            if free:
                self._owner = None
                if self._waiting:
                    self._wake(had_turn=True)

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
