"""How a step is started: in the caller, in a worker thread, or on a CUDA stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from engine.types import StepHandle, StepResult
from utils.errors import StepError


class Launcher(ABC):
    """Starts steps, one after the other."""

    @abstractmethod
    def launch(self, step_id: int, step: Callable[[], Tensor]) -> StepHandle:
        """Start `step`, which returns the new tokens [R] on the device."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what was started."""


class _Ended(StepHandle):
    """A step that has run, or failed."""

    def __init__(self, step_id: int, tokens: Tensor | None, error: Exception | None) -> None:
        self._step_id = step_id
        self._tokens = tokens
        self._error = error

    def result(self) -> StepResult:
        if self._tokens is None:
            raise _step_error(self._step_id, self._error) from self._error
        return StepResult(self._step_id, self._tokens.unsqueeze(1).tolist())


class _Future(StepHandle):
    """A step that runs in a worker thread."""

    def __init__(self, step_id: int, tokens: Future[Tensor]) -> None:
        self._step_id = step_id
        self._tokens = tokens

    def result(self) -> StepResult:
        try:
            tokens = self._tokens.result()
        except Exception as error:
            raise _step_error(self._step_id, error) from error
        return StepResult(self._step_id, tokens.unsqueeze(1).tolist())

    def done(self) -> bool:
        return self._tokens.done()


class InlineLauncher(Launcher):
    """Runs a step inside `launch`."""

    def launch(self, step_id: int, step: Callable[[], Tensor]) -> StepHandle:
        try:
            return _Ended(step_id, step(), None)
        except Exception as error:
            return _Ended(step_id, None, error)

    def close(self) -> None:
        """Every step has ended already."""


class ThreadLauncher(Launcher):
    """Runs steps in one worker thread, so that the caller goes on meanwhile."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "step")

    def launch(self, step_id: int, step: Callable[[], Tensor]) -> StepHandle:
        return _Future(step_id, self._worker.submit(step))

    def close(self) -> None:
        self._worker.shutdown()


class _Copy(StepHandle):
    """A step enqueued on a stream, its tokens on their way to pinned memory."""

    def __init__(self, step_id: int, tokens: Tensor, done: torch.cuda.Event) -> None:
        self._step_id = step_id
        self._tokens = tokens
        self._done = done

    def result(self) -> StepResult:
        try:
            self._done.synchronize()
        except RuntimeError as error:
            raise _step_error(self._step_id, error) from error
        return StepResult(self._step_id, self._tokens.unsqueeze(1).tolist())

    def done(self) -> bool:
        try:
            return bool(self._done.query())  # type: ignore[no-untyped-call]
        except RuntimeError:
            return True  # the device failed, as `result` will say


class StreamLauncher(Launcher):
    """Enqueues steps on a CUDA stream of its own and copies their tokens back behind them.

    Args:
        max_tokens: most tokens a step returns.
        in_flight: most steps whose results are outstanding at once.
    """

    def __init__(self, device: torch.device, max_tokens: int, in_flight: int) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._results = [
            (
                torch.empty(max_tokens, dtype=torch.int64, pin_memory=True),
                torch.cuda.Event(),  # type: ignore[no-untyped-call]
            )
            for _ in range(in_flight)
        ]
        self._turn = 0

    def launch(self, step_id: int, step: Callable[[], Tensor]) -> StepHandle:
        self._turn = (self._turn + 1) % len(self._results)
        buffer, done = self._results[self._turn]
        try:
            with torch.cuda.stream(self.stream):
                tokens = step()
                pinned = buffer[: tokens.shape[0]]
                pinned.copy_(tokens, non_blocking=True)
                done.record(self.stream)
        except Exception as error:
            return _Ended(step_id, None, error)
        return _Copy(step_id, pinned, done)

    def close(self) -> None:
        self.stream.synchronize()


def _step_error(step_id: int, error: Exception | None) -> StepError:
    return error if isinstance(error, StepError) else StepError(f"step {step_id} failed: {error}")
