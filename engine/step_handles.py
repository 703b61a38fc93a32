"""Launchers start steps, and return a `StepHandle` for each step: the step's future result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.hidden_rows import HiddenStates
from engine.step_scores import StepScores
from engine.torch_state import Pending, TorchState
from engine.types import Clock, RowReport, StepHandle, StepPlan, StepResult
from layers.sampler import NO_TOKEN
from utils.errors import LogitsError, StepError


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step drew.

    Attributes:
        tokens: the R tokens, int64 [R]; `NO_TOKEN` for a row whose logits leave no choice.
        scores: log-probabilities, if a request asks for any.
        errors: why logits processors failed, by the index of the row among the R sampled rows.
        hidden: hidden states, if a request asks for any.

    A `StreamLauncher` replaces the tensors by NumPy arrays, which the caller's torch modes ignore.
    """

    tokens: Tensor
    scores: StepScores | None = None
    errors: dict[int, LogitsError] = field(default_factory=dict)
    hidden: HiddenStates | None = None

    def result(self, plan: StepPlan, ended_at: float, seconds: float | None) -> StepResult:
        """Return the output as the result of `plan`, with an error for each row without a token.

        All tensors must be in host memory. `seconds` is the duration of the step.
        """
        drawn = self.tokens.tolist()
        tokens = [[token] for token in drawn]
        new, prompt = self.scores.logprobs(len(tokens)) if self.scores else (None, None)
        hidden = self.hidden.by_row() if self.hidden else {}
        reports = {row: RowReport(hidden_states=found) for row, found in hidden.items()}
        if NO_TOKEN in drawn:
            unknown = LogitsError(
                "the logits have a NaN or are all -inf: there is no token to choose"
            )
            for i, row in enumerate(plan.sampled_rows):
                if drawn[i] == NO_TOKEN:
                    error = self.errors.get(i, unknown)
                    tokens[i], reports[row] = [], RowReport(error, hidden_states=hidden.get(row))
        return StepResult(plan.step_id, tokens, ended_at, new, prompt, seconds, reports)


Step = Callable[[], StepOutput]


class HostLauncher:
    """Runs steps on the host, inside `launch` or, if `in_thread` is True, in a worker thread."""

    def __init__(self, clock: Clock, *, in_thread: bool) -> None:
        self._clock = clock
        self._in_thread = in_thread
        self.state = TorchState()

    def launch(self, plan: StepPlan, step: Step) -> StepHandle:
        """Start the step of `plan`."""

        def run() -> StepResult:
            begin = self._clock()
            output = step()
            end = self._clock()
            return output.result(plan, end, end - begin if plan.timed else None)

        def run_in_worker() -> StepResult:
            try:
                return run()
            except Exception:
                raise
            except BaseException as error:  # if `result` raised SystemExit, its caller would exit
                raise _step_error(plan.step_id, error) from error

        if self._in_thread:
            return _HostStep(plan.step_id, self.state.submit(run_in_worker))
        try:
            result = self.state.run(run)
        except Exception as error:
            return _HostStep(plan.step_id, Pending.failed(error))
        return _HostStep(plan.step_id, Pending.of(result))

    def close(self) -> None:
        """Wait until all launched steps have ended."""
        self.state.close()


@dataclass(slots=True)
class _HostStep(StepHandle):
    """`StepHandle` of a step that runs on the host, or of a step that could not be enqueued."""

    _step_id: int
    _ended: Pending[StepResult]

    def result(self) -> StepResult:
        try:
            return self._ended.result()
        except StepError:
            raise
        except Exception as error:
            raise _step_error(self._step_id, error) from error

    def done(self) -> bool:
        return self._ended.done()


class StreamLauncher:
    """Enqueues steps on one CUDA stream, and copies the output of each step to host memory.

    Args:
        max_tokens: maximum number of new tokens in a step.
        in_flight: maximum number of launched steps whose results have not been read.
    """

    def __init__(self, clock: Clock, device: torch.device, max_tokens: int, in_flight: int) -> None:
        self._clock = clock
        self.state = TorchState()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        empty = partial(torch.empty, max_tokens, dtype=torch.int64, device="cpu", pin_memory=True)
        self._results = [
            (
                self.state.run(empty),
                torch.cuda.Event(),  # type: ignore[no-untyped-call]
            )
            for _ in range(in_flight)
        ]
        self._turn = 0

    def launch(self, plan: StepPlan, step: Step) -> StepHandle:
        """Enqueue the step of `plan`."""
        self._turn = (self._turn + 1) % len(self._results)
        buffer, done = self._results[self._turn]
        timer = partial(torch.cuda.Event, enable_timing=True)
        work = (timer(), timer()) if plan.timed else None

        def enqueue() -> StepOutput:
            with torch.cuda.stream(self.stream):
                if work:
                    work[0].record(self.stream)
                output = step()
                if work:
                    work[1].record(self.stream)
                pinned = buffer[: output.tokens.shape[0]]
                pinned.copy_(output.tokens, non_blocking=True)
                tokens: Any = pinned.numpy()
                output = replace(output, tokens=tokens)
                if output.scores is not None:
                    output = replace(output, scores=output.scores.pinned())
                if output.hidden is not None:
                    output = replace(output, hidden=output.hidden.pinned())
                done.record(self.stream)
                return output

        try:
            output = self.state.run(enqueue)
        except Exception as error:
            return _HostStep(plan.step_id, Pending.failed(error))
        return _StreamStep(plan, output, done, self._clock, work)

    def close(self) -> None:
        """Wait until all launched steps have ended."""
        self.state.close()
        self.stream.synchronize()


@dataclass(slots=True)
class _StreamStep(StepHandle):
    """`StepHandle` of a step on a CUDA stream. `_output` is complete after the event `_done`."""

    _plan: StepPlan
    _output: StepOutput
    _done: torch.cuda.Event
    _clock: Clock
    _work: tuple[torch.cuda.Event, torch.cuda.Event] | None
    _ended_at: float | None = None

    def result(self) -> StepResult:
        try:
            self._done.synchronize()
        except RuntimeError as error:
            raise _step_error(self._plan.step_id, error) from error
        if self._ended_at is None:
            self._ended_at = self._clock()
        seconds = None
        if self._work is not None:
            begin, end = self._work
            seconds = begin.elapsed_time(end) / 1e3
        return self._output.result(self._plan, self._ended_at, seconds)

    def done(self) -> bool:
        try:
            done = bool(self._done.query())  # type: ignore[no-untyped-call]
        except RuntimeError:
            return True  # CUDA has failed: `result` will raise a StepError at once
        if done and self._ended_at is None:
            self._ended_at = self._clock()
        return done


def _step_error(step_id: int, error: BaseException) -> StepError:
    return StepError(f"step {step_id} failed: {type(error).__name__}: {error}")
