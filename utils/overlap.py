"""What the host does while the device works: the phases of steps, recorded as they run.

The recording parts are ordinary plug-ins: a scheduler and a runner that note when their methods
begin and end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from config import Config
from engine.model_runner import LocalRunner
from engine.scheduler import ContinuousScheduler
from engine.sequence import Sequence
from engine.types import BlockManager, StepHandle, StepPlan, StepResult
from llm import LLM, SamplingParams

HOST_PHASES = ("schedule", "launch", "commit")


@dataclass(frozen=True)
class Span:
    """A phase of a step, in seconds from an origin that host and device share."""

    step_id: int
    phase: str
    start: float
    end: float


class Recorder:
    """Spans of a run; the device's are known once `resolve` was called.

    Must be made while the device is idle.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._events: list[tuple[int, Any, Any]] = []
        self._base = _event()
        torch.cuda.synchronize()
        self._base.record()
        self._base.synchronize()
        self._origin = time.perf_counter()

    @contextmanager
    def phase(self, step_id: int, name: str) -> Iterator[None]:
        """Record what runs inside, in host time."""
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.spans.append(Span(step_id, name, start - self._origin, end - self._origin))

    @contextmanager
    def device(self, step_id: int, stream: torch.cuda.Stream) -> Iterator[None]:
        """Record what is enqueued on `stream` inside, in device time."""
        start, end = _event(), _event()
        start.record(stream)
        yield
        end.record(stream)
        self._events.append((step_id, start, end))

    def resolve(self) -> None:
        """Read the device's times."""
        torch.cuda.synchronize()
        for step_id, start, end in self._events:
            at, to = (self._base.elapsed_time(e) / 1e3 for e in (start, end))
            self.spans.append(Span(step_id, "device", at, to))
        self._events.clear()


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _RecordedHandle(StepHandle):
    def __init__(self, step_id: int, handle: StepHandle, recorder: Recorder) -> None:
        self._step_id, self._handle, self._recorder = step_id, handle, recorder

    def result(self) -> StepResult:
        with self._recorder.phase(self._step_id, "wait"):
            return self._handle.result()


class _RecordedRunner(LocalRunner):
    def __init__(self, config: Config, checkpoint: Any, recorder: Recorder) -> None:
        super().__init__(config, checkpoint)
        self._recorder = recorder

    def execute(self, plan: StepPlan) -> StepHandle:
        recorder, stream = self._recorder, torch.cuda.current_stream()
        stream = getattr(self._launcher, "stream", stream)
        with recorder.phase(plan.step_id, "launch"), recorder.device(plan.step_id, stream):
            handle = super().execute(plan)
        return _RecordedHandle(plan.step_id, handle, recorder)


class _RecordedScheduler(ContinuousScheduler):
    def __init__(self, config: Config, blocks: BlockManager, recorder: Recorder) -> None:
        super().__init__(config, blocks)
        self._recorder = recorder
        self._next_step_id = 0

    def schedule(self) -> StepPlan | None:
        with self._recorder.phase(self._next_step_id, "schedule"):
            plan = super().schedule()
        self._next_step_id += plan is not None
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        with self._recorder.phase(plan.step_id, "commit"):
            return super().commit(plan, result)


@dataclass(frozen=True)
class Overlap:
    """Medians over the decode steps of a full batch, in seconds.

    Attributes:
        phases: of each phase of the host, and "device".
        period: from the end of one step on the device to the end of the next.
        spans: of some steps in a row.
    """

    num_requests: int
    phases: dict[str, float]
    period: float
    spans: list[Span]

    @property
    def host(self) -> float:
        """What the host does for a step besides waiting."""
        return sum(self.phases[name] for name in HOST_PHASES)


def measure_overlap(
    path: Path, num_requests: int = 256, prompt: int = 512, output: int = 80
) -> Overlap:
    """Run a full batch on the CUDA device and take the steps in which all requests decode."""
    recorder = Recorder()
    params = SamplingParams(temperature=0.6, max_tokens=output, ignore_eos=True)
    prompts = [[(7 * i + j) % 997 for j in range(prompt)] for i in range(num_requests)]
    with LLM(
        path,
        device="cuda",
        scheduler=lambda config, blocks: _RecordedScheduler(config, blocks, recorder),
        model_runner=lambda config, checkpoint: _RecordedRunner(config, checkpoint, recorder),
    ) as llm:
        for _ in range(2):
            llm.reset_prefix_cache()
            recorder.resolve()
            recorder.spans.clear()
            llm.generate(prompts, params, use_tqdm=False)
        recorder.resolve()
    ends = {s.step_id: s.end for s in recorder.spans if s.phase == "device"}
    steps = sorted(ends)[-output // 2 : -4]
    durations: dict[str, list[float]] = {name: [] for name in (*HOST_PHASES, "wait", "device")}
    for span in recorder.spans:
        if steps[0] <= span.step_id <= steps[-1]:
            durations[span.phase].append(span.end - span.start)
    return Overlap(
        num_requests,
        {name: statistics.median(values) for name, values in durations.items()},
        statistics.median(ends[b] - ends[a] for a, b in pairwise(steps)),
        [s for s in recorder.spans if steps[2] <= s.step_id <= steps[6]],
    )


def draw(overlap: Overlap, path: Path) -> None:
    """Write the recorded steps as an SVG: the host's phases above, the device below."""
    colours = {
        "schedule": "#4c78a8",
        "launch": "#f58518",
        "commit": "#54a24b",
        "wait": "#dddddd",
        "device": "#b279a2",
    }
    spans = overlap.spans
    first, last = min(s.start for s in spans), max(s.end for s in spans)
    scale = 1000 / (last - first)
    parts = []
    for span in spans:
        x, width = 70 + (span.start - first) * scale, (span.end - span.start) * scale
        y = 70 if span.phase == "device" else 25
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.7):.1f}" height="30" '
            f'fill="{colours[span.phase]}" stroke="#ffffff" stroke-width="0.4"/>'
        )
        if span.phase in ("device", "wait"):
            parts.append(
                f'<text x="{x + width / 2:.1f}" y="{y + 20}" text-anchor="middle">'
                f"{'' if span.phase == 'device' else 'wait for '}step {span.step_id}</text>"
            )
    legend = "".join(
        f'<rect x="{70 + 130 * i}" y="120" width="12" height="12" fill="{colours[name]}"/>'
        f'<text x="{87 + 130 * i}" y="131">{name} {1e3 * overlap.phases[name]:.2f} ms</text>'
        for i, name in enumerate(colours)
    )
    ticks = "".join(
        f'<text x="{70 + i * 1e-3 * scale:.1f}" y="15" text-anchor="middle">{i} ms</text>'
        for i in range(0, int(1e3 * (last - first)) + 1, 2)
    )
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1090 145" '
        'font-family="sans-serif" font-size="11">'
        '<rect width="1090" height="145" fill="#ffffff"/>'
        f'{ticks}<text x="5" y="45">host</text><text x="5" y="90">device</text>'
        f"{''.join(parts)}{legend}</svg>\n"
    )
