"""How the host's work for a step hides behind the device's."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.recording import Recorder, recorded_llm
from benchmarks.spans import Span
from llm import SamplingParams

HOST_PHASES = ("plan", "launch", "commit")


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
    path: Path, num_requests: int = 256, prompt: int = 512, output: int = 80, **options: Any
) -> Overlap:
    """Run a full batch on the CUDA device and take the steps in which all requests decode.

    Args:
        options: of the LLM.
    """
    recorder = Recorder()
    params = SamplingParams(temperature=0.6, max_tokens=output, ignore_eos=True)
    prompts = [[(7 * i + j) % 997 for j in range(prompt)] for i in range(num_requests)]
    with recorded_llm(str(path), recorder, device="cuda", **options) as llm:
        for _ in range(2):
            llm.reset_prefix_cache()
            recorder.clear()
            llm.generate(prompts, params, use_tqdm=False)
        recorder.resolve()
    ends = {s.step_id: s.end for s in recorder.spans if s.phase == "device"}
    steps = sorted(ends)[-output // 2 : -4]
    durations: dict[str, list[float]] = {name: [] for name in (*HOST_PHASES, "wait", "device")}
    for span in recorder.spans:
        if span.phase in durations and steps[0] <= span.step_id <= steps[-1]:
            durations[span.phase].append(span.end - span.start)
    return Overlap(
        num_requests,
        {name: statistics.median(values) for name, values in durations.items()},
        statistics.median(ends[b] - ends[a] for a, b in pairwise(steps)),
        [s for s in recorder.spans if s.phase in durations and steps[2] <= s.step_id <= steps[6]],
    )


def draw(overlap: Overlap, path: Path) -> None:
    """Write the recorded steps as an SVG: the host's phases above, the device below."""
    colours = {
        "plan": "#4c78a8",
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
