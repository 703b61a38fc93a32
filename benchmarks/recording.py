"""A run of this engine with its steps recorded.

The recording parts are ordinary plug-ins, so that the engine has no timers: a scheduler and a
runner that note when their methods begin and end, and a decoder of tokens that does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.spans import Span
from config import Config
from engine.model_runner import LocalRunner
from engine.ranks.runner import TensorParallelRunner
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from engine.types import BlockManager, Clock, ModelRunner, StepHandle, StepPlan, StepResult
from llm import LLM
from utils.text import Decoder

# What the host does for a step; "stage" is a part of "launch".
PHASES = ("plan", "stage", "launch", "wait", "commit", "detokenize")
# The methods of DeviceState that bring a plan to the device.
_STAGING = ("apply", "rows")


class Recorder:
    """Spans of a run; the device's are known once `resolve` was called.

    Must be made while the device is idle.

    Args:
        mark: makes a range of a name for other tools, around every phase of the host: e.g.
            `torch.cuda.nvtx.range` or `torch.profiler.record_function`.

    Attributes:
        token_times: of each request by its id, when its tokens were committed.
    """

    def __init__(
        self, mark: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
    ) -> None:
        self.spans: list[Span] = []
        self.token_times: dict[int, list[float]] = {}
        self._mark = mark
        self._events: list[tuple[int, Any, Any]] = []
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            self._base = _event()
            torch.cuda.synchronize()
            self._base.record()
            self._base.synchronize()
        self._origin = time.perf_counter()

    def now(self) -> float:
        """Seconds since the origin of all spans."""
        return time.perf_counter() - self._origin

    def clear(self) -> None:
        """Forget what was recorded; the device must be idle."""
        self.resolve()
        self.spans.clear()
        self.token_times.clear()

    @contextmanager
    def phase(self, step_id: int, name: str) -> Iterator[None]:
        """Record what runs inside, in host time."""
        start = self.now()
        with self._mark(name):
            yield
        self.spans.append(Span(step_id, name, start, self.now()))

    @contextmanager
    def device(self, step_id: int, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Record what is enqueued on `stream` inside, in device time; nothing without one."""
        if stream is None:
            yield
            return
        start, end = _event(), _event()
        start.record(stream)
        yield
        end.record(stream)
        self._events.append((step_id, start, end))

    def resolve(self) -> None:
        """Read the device's times."""
        if self._cuda:
            torch.cuda.synchronize()
        for step_id, start, end in self._events:
            at, to = (self._base.elapsed_time(e) / 1e3 for e in (start, end))
            self.spans.append(Span(step_id, "device", at, to))
        self._events.clear()


def recorded_llm(model: str, recorder: Recorder, **options: Any) -> LLM:
    """An LLM with the recording parts, and their scheduler and runner in place of others."""
    llm = LLM(
        model,
        **options,
        scheduler=partial(_RecordedScheduler, recorder=recorder),
        model_runner=lambda config, checkpoint: _recorded_runner(config, checkpoint, recorder),
    )
    if llm.tokenizer is not None:
        llm.decode = _recorded_decoding(llm.decode, recorder)
    return llm


def _recorded_runner(config: Config, checkpoint: Any, recorder: Recorder) -> ModelRunner:
    kind = _RecordedRunner if config.tensor_parallel_size == 1 else _RecordedRanks
    return kind(config, checkpoint, recorder)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _RecordedHandle(StepHandle):
    def __init__(self, step_id: int, handle: StepHandle, recorder: Recorder) -> None:
        self._step_id, self._handle, self._recorder = step_id, handle, recorder

    def result(self) -> StepResult:
        with self._recorder.phase(self._step_id, "wait"):
            return self._handle.result()

    def done(self) -> bool:
        return self._handle.done()


class _RecordedRunner(LocalRunner):
    def __init__(self, config: Config, checkpoint: Any, recorder: Recorder) -> None:
        super().__init__(config, checkpoint)
        self._recorder = recorder
        self._step_id = 0
        for name in _STAGING:
            setattr(self._state, name, self._staged(getattr(self._state, name)))

    def execute(self, plan: StepPlan) -> StepHandle:
        recorder, stream = self._recorder, getattr(self._launcher, "stream", None)
        self._step_id = plan.step_id
        with recorder.phase(plan.step_id, "launch"), recorder.device(plan.step_id, stream):
            handle = super().execute(plan)
        return _RecordedHandle(plan.step_id, handle, recorder)

    def _staged(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def stage(*args: Any, **kwargs: Any) -> Any:
            with self._recorder.phase(self._step_id, "stage"):
                return method(*args, **kwargs)

        return stage


class _RecordedRanks(TensorParallelRunner):
    """Seen from the process that plans: the ranks stage and compute in others, unrecorded."""

    def __init__(self, config: Config, checkpoint: Any, recorder: Recorder) -> None:
        super().__init__(config, checkpoint)
        self._recorder = recorder

    def execute(self, plan: StepPlan) -> StepHandle:
        with self._recorder.phase(plan.step_id, "launch"):
            handle = super().execute(plan)
        return _RecordedHandle(plan.step_id, handle, self._recorder)


class _RecordedScheduler(ContinuousScheduler):
    def __init__(
        self, config: Config, blocks: BlockManager, clock: Clock, recorder: Recorder
    ) -> None:
        super().__init__(config, blocks, clock)
        self._recorder = recorder
        self._next_step_id = 0
        self._request_ids: dict[int, int] = {}

    def schedule(self) -> StepPlan | None:
        with self._recorder.phase(self._next_step_id, "plan"):
            plan = super().schedule()
        self._next_step_id += plan is not None
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        with self._recorder.phase(plan.step_id, "commit"):
            finished = super().commit(plan, result)
        self._request_ids |= {new.slot: new.request_id for new in plan.new_requests}
        now = self._recorder.now()
        for slot, tokens in zip(plan.sampled_slots, result.tokens, strict=True):
            times = self._recorder.token_times.setdefault(self._request_ids[slot], [])
            times += [now] * len(tokens)
        return finished


def _recorded_decoding(decoder: Decoder, recorder: Recorder) -> Decoder:
    """A decoder of tokens that is recorded, under step -1."""

    def recorded(token_ids: list[int]) -> str:
        with recorder.phase(-1, "detokenize"):
            return decoder(token_ids)

    return replace(decoder, decode=recorded)
