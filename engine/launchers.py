"""How a step is started: in the caller, in a worker thread, or on a CUDA stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.extras import Scored
from engine.types import StepHandle, StepResult
from utils.errors import StepError


@dataclass(frozen=True, slots=True)
class StepOutput:
    """A step's new tokens [R] int64, and their log-probabilities if a request wants them."""

    tokens: Tensor
    scored: Scored | None = None

    def result(self, step_id: int) -> StepResult:
        """The step's result; both have to be on the host."""
        tokens = self.tokens.unsqueeze(1).tolist()
        return self.scored.result(step_id, tokens) if self.scored else StepResult(step_id, tokens)


class Launcher(ABC):
    """Starts steps, one after the other."""

    @abstractmethod
    def launch(self, step_id: int, step: Callable[[], StepOutput]) -> StepHandle:
        """Start `step`, whose output is on the device."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what was started."""


class _Ended(StepHandle):
    """A step that has run, or failed."""

    def __init__(self, step_id: int, output: StepOutput | None, error: Exception | None) -> None:
        self._step_id = step_id
        self._output = output
        self._error = error

    def result(self) -> StepResult:
        if self._output is None:
            raise _step_error(self._step_id, self._error) from self._error
        return self._output.result(self._step_id)


class _Future(StepHandle):
    """A step that runs in a worker thread."""

    def __init__(self, step_id: int, output: Future[StepOutput]) -> None:
        self._step_id = step_id
        self._output = output

    def result(self) -> StepResult:
        try:
            output = self._output.result()
        except Exception as error:
            raise _step_error(self._step_id, error) from error
        return output.result(self._step_id)

    def done(self) -> bool:
        return self._output.done()


class InlineLauncher(Launcher):
    """Runs a step inside `launch`."""

    def launch(self, step_id: int, step: Callable[[], StepOutput]) -> StepHandle:
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

    def launch(self, step_id: int, step: Callable[[], StepOutput]) -> StepHandle:
        return _Future(step_id, self._worker.submit(step))

    def close(self) -> None:
        self._worker.shutdown()


class _Copy(StepHandle):
    """A step enqueued on a stream, its output on its way to pinned memory."""

    def __init__(self, step_id: int, output: StepOutput, done: torch.cuda.Event) -> None:
        self._step_id = step_id
        self._output = output
        self._done = done

    def result(self) -> StepResult:
        try:
            self._done.synchronize()
        except RuntimeError as error:
            raise _step_error(self._step_id, error) from error
        return self._output.result(self._step_id)

    def done(self) -> bool:
        try:
            return bool(self._done.query())  # type: ignore[no-untyped-call]
        except RuntimeError:
            return True  # the device failed, as `result` will say


class StreamLauncher(Launcher):
    """Enqueues steps on a CUDA stream of its own and copies their output back behind them.

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

    def launch(self, step_id: int, step: Callable[[], StepOutput]) -> StepHandle:
        self._turn = (self._turn + 1) % len(self._results)
        buffer, done = self._results[self._turn]
        try:
            with torch.cuda.stream(self.stream):
                output = step()
                pinned = buffer[: output.tokens.shape[0]]
                pinned.copy_(output.tokens, non_blocking=True)
                scored = output.scored
                if scored is not None:
                    scored = replace(scored, scores=scored.scores.pinned())
                done.record(self.stream)
        except Exception as error:
            return _Ended(step_id, None, error)
        return _Copy(step_id, StepOutput(pinned, scored), done)

    def close(self) -> None:
        self.stream.synchronize()


def _step_error(step_id: int, error: Exception | None) -> StepError:
    return error if isinstance(error, StepError) else StepError(f"step {step_id} failed: {error}")
