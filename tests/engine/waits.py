"""How a test says that something is noticed at once, whatever else the machine does meanwhile."""

from __future__ import annotations

import selectors
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Against hanging, in seconds; nothing here takes long.
PATIENCE = 60.0
# The writer of a full socket looks again every 50 us; all other waits are much longer.
_SHORT = 1e-3


def _hangs(*_: object) -> None:
    raise TimeoutError(f"nothing was noticed for {PATIENCE} s")


@contextmanager
def no_wait_runs_out() -> Iterator[None]:
    """What is waited for within comes as a message or as the end of a file.

    That is counted instead of the time it takes: no wait for the ranks ends because its time is
    up. One without an end fails after `PATIENCE`. For the main thread.
    """
    select = selectors.DefaultSelector.select
    ran_out: list[float] = []

    def counted(self: Any, timeout: float | None = None) -> list[Any]:
        ready = select(self, timeout)
        if not ready and timeout is not None and timeout > _SHORT:
            ran_out.append(timeout)
        return ready

    before = signal.signal(signal.SIGALRM, _hangs)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selectors.DefaultSelector, "select", counted)
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ran_out == []
