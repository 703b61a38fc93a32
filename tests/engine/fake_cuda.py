"""A CUDA stream without a device: what is enqueued runs when the test, or a wait, has it run.

It stands in for what `engine.step_handles` and `engine.device_state` use of torch: one stream,
events, pinned memory, and copies that return before they are made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor


class FakeStream:
    """Work in order, as of a device that is as late as the test wants."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], object]] = deque()

    def __len__(self) -> int:
        """What is enqueued and has not run."""
        return len(self._work)

    def enqueue(self, work: Callable[[], object]) -> None:
        """Have it run after all that was enqueued before."""
        self._work.append(work)

    def run(self, count: int | None = None) -> None:
        """Run so much of what is enqueued; all if None."""
        # A device knows no inference mode. It alone may write tensors of both kinds.
        with torch.inference_mode():
            for _ in range(len(self._work) if count is None else min(count, len(self._work))):
                self._work.popleft()()

    def synchronize(self) -> None:
        """Wait for all."""
        self.run()


class FakeEvent:
    """An event of the one stream; as CUDA's, it is of the last `record` alone."""

    stream: ClassVar[FakeStream]

    def __init__(self, *args: object, **options: object) -> None:
        self._recorded = self._reached = 0

    def record(self, stream: FakeStream | None = None) -> None:
        """Is reached when the stream gets here."""
        assert stream in (None, self.stream)
        self._recorded += 1
        number = self._recorded

        def reach() -> None:
            self._reached = number

        self.stream.enqueue(reach)

    def query(self) -> bool:
        """Whether it is reached, or was never recorded."""
        return self._reached == self._recorded

    def synchronize(self) -> None:
        """Wait for it, and for nothing behind it."""
        while not self.query():
            self.stream.run(1)

    def elapsed_time(self, end: FakeEvent) -> float:
        """Milliseconds to a later event; no time passes here."""
        assert self.query()
        assert end.query()
        return 0.0


class Pinned(Tensor):
    """Pinned memory, views of it included: copies out of and into it may be left for later."""

    stream: ClassVar[FakeStream]

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Pinned:
        target, source = self.as_subclass(Tensor), source.as_subclass(Tensor)
        if non_blocking:
            self.stream.enqueue(lambda: target.copy_(source))
        else:
            target.copy_(source)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave copies out of pinned memory into a tensor of the device for later."""
        target, *rest = args
        if func is Tensor.copy_ and not isinstance(target, Pinned) and kwargs:
            source = rest[0].as_subclass(Tensor)
            cls.stream.enqueue(lambda: target.copy_(source))
            return target
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Tensor:  # type: ignore[override]
        assert device.type == "cuda"
        source: Tensor = self.as_subclass(Tensor)
        target = torch.zeros_like(source)
        self.stream.enqueue(lambda: target.copy_(source))
        if not non_blocking:
            self.stream.run()
        return target


def install(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """Have torch make fakes; returns the stream of the one device."""
    stream = FakeStream()
    empty = torch.empty

    def fake_empty(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made: Any = empty(*shape, **options)
        return made.as_subclass(Pinned) if pin_memory else made  # type: ignore[no-any-return]

    monkeypatch.setattr(FakeEvent, "stream", stream, raising=False)
    monkeypatch.setattr(Pinned, "stream", stream, raising=False)
    monkeypatch.setattr(torch, "empty", fake_empty)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **options: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: stream)
    return stream
