"""How a step is started: in the caller, in a worker thread, or on a CUDA stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.extras import Scored
from engine.types import Clock, StepHandle, StepResult
from utils.errors import StepError


@dataclass(frozen=True, slots=True)
class StepOutput:
    """A step's new tokens [R] int64, and their log-probabilities if a request wants them."""

    tokens: Tensor
    scored: Scored | None = None

    def result(self, step_id: int, ended_at: float, device_seconds: float | None) -> StepResult:
        """The step's result; tokens and log-probabilities have to be on the host."""
        tokens = self.tokens.unsqueeze(1).tolist()
        new, prompt = self.scored.logprobs(len(tokens)) if self.scored else (None, None)
        return StepResult(step_id, tokens, ended_at, new, prompt, device_seconds)


@dataclass(frozen=True, slots=True)
class Ended:
    """A step that has run on the host.

    Attributes:
        ended_at: when, on the runner's clock.
        seconds: how long it ran.
    """

    output: StepOutput
    ended_at: float
    seconds: float


class Launcher(ABC):
    """Starts steps, one after the other.

    Args:
        clock: the runner's.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    @abstractmethod
    def launch(
        self, step_id: int, step: Callable[[], StepOutput], *, timed: bool = False
    ) -> StepHandle:
        """Start `step`, whose output is on the device.

        Args:
            timed: the result tells how long the device worked on it.
        """

    def _run(self, step: Callable[[], StepOutput]) -> Ended:
        """Run a step here and now."""
        begin = self._clock()
        output = step()
        end = self._clock()
        return Ended(output, end, end - begin)

    @abstractmethod
    def close(self) -> None:
        """Wait for what was started."""


class _Ended(StepHandle):
    """A step that has run, or failed."""

    def __init__(self, step_id: int, timed: bool, ended: Ended | Exception) -> None:
        self._step_id = step_id
        self._timed = timed
        self._ended = ended

    def result(self) -> StepResult:
        if isinstance(self._ended, Exception):
            raise _step_error(self._step_id, self._ended) from self._ended
        return _result(self._step_id, self._timed, self._ended)


class _Future(StepHandle):
    """A step that runs in a worker thread."""

    def __init__(self, step_id: int, timed: bool, ended: Future[Ended]) -> None:
        self._step_id = step_id
        self._timed = timed
        self._ended = ended

    def result(self) -> StepResult:
        try:
            ended = self._ended.result()
        except Exception as error:
            raise _step_error(self._step_id, error) from error
        return _result(self._step_id, self._timed, ended)

    def done(self) -> bool:
        return self._ended.done()


class InlineLauncher(Launcher):
    """Runs a step inside `launch`."""

    def launch(
        self, step_id: int, step: Callable[[], StepOutput], *, timed: bool = False
    ) -> StepHandle:
        try:
            return _Ended(step_id, timed, self._run(step))
        except Exception as error:
            return _Ended(step_id, timed, error)

    def close(self) -> None:
        """Every step has ended already."""


class ThreadLauncher(Launcher):
    """Runs steps in one worker thread, so that the caller goes on meanwhile."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._worker = ThreadPoolExecutor(1, "step")

    def launch(
        self, step_id: int, step: Callable[[], StepOutput], *, timed: bool = False
    ) -> StepHandle:
        return _Future(step_id, timed, self._worker.submit(self._run, step))

    def close(self) -> None:
        self._worker.shutdown()


class _Copy(StepHandle):
    """A step enqueued on a stream, its output on its way to pinned memory."""

    def __init__(
        self,
        step_id: int,
        output: StepOutput,
        done: torch.cuda.Event,
        clock: Clock,
        work: tuple[torch.cuda.Event, torch.cuda.Event] | None,
    ) -> None:
        self._step_id = step_id
        self._output = output
        self._done = done
        self._clock = clock
        self._work = work
        self._ended_at: float | None = None

    def result(self) -> StepResult:
        try:
            self._done.synchronize()
        except RuntimeError as error:
            raise _step_error(self._step_id, error) from error
        if self._ended_at is None:
            self._ended_at = self._clock()
        seconds = None
        if self._work is not None:
            begin, end = self._work
            seconds = begin.elapsed_time(end) / 1e3
        return self._output.result(self._step_id, self._ended_at, seconds)

    def done(self) -> bool:
        try:
            done = bool(self._done.query())  # type: ignore[no-untyped-call]
        except RuntimeError:
            return True  # the device failed, as `result` will say
        if done and self._ended_at is None:
            self._ended_at = self._clock()
        return done


class StreamLauncher(Launcher):
    """Enqueues steps on a CUDA stream of its own and copies their output back behind them.

    Args:
        clock: the runner's.
        device: whose stream it is.
        max_tokens: most tokens a step returns.
        in_flight: most steps whose results are outstanding at once.
    """

    def __init__(self, clock: Clock, device: torch.device, max_tokens: int, in_flight: int) -> None:
        super().__init__(clock)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._results = [
            (
                torch.empty(max_tokens, dtype=torch.int64, pin_memory=True),
                torch.cuda.Event(),  # type: ignore[no-untyped-call]
            )
            for _ in range(in_flight)
        ]
        self._turn = 0

    def launch(
        self, step_id: int, step: Callable[[], StepOutput], *, timed: bool = False
    ) -> StepHandle:
        self._turn = (self._turn + 1) % len(self._results)
        buffer, done = self._results[self._turn]
        work = (_timer(), _timer()) if timed else None
        try:
            with torch.cuda.stream(self.stream):
                if work:
                    work[0].record(self.stream)
                output = step()
                if work:
                    work[1].record(self.stream)
                pinned = buffer[: output.tokens.shape[0]]
                pinned.copy_(output.tokens, non_blocking=True)
                scored = output.scored
                if scored is not None:
                    scored = replace(scored, scores=scored.scores.pinned())
                done.record(self.stream)
        except Exception as error:
            return _Ended(step_id, timed, error)
        return _Copy(step_id, StepOutput(pinned, scored), done, self._clock, work)

    def close(self) -> None:
        self.stream.synchronize()


def _timer() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _result(step_id: int, timed: bool, ended: Ended) -> StepResult:
    return ended.output.result(step_id, ended.ended_at, ended.seconds if timed else None)


def _step_error(step_id: int, error: Exception | None) -> StepError:
    return error if isinstance(error, StepError) else StepError(f"step {step_id} failed: {error}")
