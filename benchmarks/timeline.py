"""Draws what each step computes: python -m benchmarks.timeline, on a fake runner."""

from __future__ import annotations

from typing import Any

from config import Config
from engine.checking.fake_runner import FakeRunner
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from engine.types import KVGeometry, StepPlan
from memory.block_manager import PagedBlockManager
from sampling_params import SamplingParams

# (step of arrival, prompt tokens, output tokens)
EXAMPLE = [(0, 5, 9), (0, 12, 7), (2, 40, 3), (3, 6, 4)]
_WIDTH = 4


def simulate(requests: list[tuple[int, int, int]], **options: Any) -> list[StepPlan]:
    """The plans for requests of (step of arrival, prompt tokens, output tokens)."""
    config = Config(model="none", max_num_seqs=4, max_num_batched_tokens=16, **options)
    geometry = KVGeometry(1, 1, 1, block_size=16, num_blocks=64, dtype_bytes=4)
    runner = FakeRunner(config, groups=(geometry,))
    scheduler = ContinuousScheduler(config, PagedBlockManager(config, geometry), runner.now)
    plans: list[StepPlan] = []
    while True:
        for i, (step, num_prompt, num_output) in enumerate(requests):
            if step == len(plans):
                total = num_prompt + num_output
                scheduler.add(
                    Sequence(i, [i] * num_prompt, SamplingParams(), max_total_tokens=total)
                )
        plan = scheduler.schedule()
        if plan is None:
            return plans
        scheduler.commit(plan, runner.execute(plan).result())
        plans.append(plan)


def draw(plans: list[StepPlan]) -> str:
    """Requests down, steps across: prompt tokens as a number, a decode as a star."""
    rows: dict[int, list[str]] = {}
    holder: dict[int, int] = {}
    for step, plan in enumerate(plans):
        for new in plan.new_requests:
            holder[new.slot] = new.request_id
            rows.setdefault(new.request_id, [""] * len(plans))
        for chunk in plan.prefill:
            rows[holder[chunk.slot]][step] = str(chunk.num_tokens)
        for slot in plan.decode:
            rows[holder[slot]][step] = "*"
    lines = ["step      " + "".join(f"{step:>{_WIDTH}}" for step in range(len(plans)))]
    for request_id, cells in sorted(rows.items()):
        line = f"request {request_id} " + "".join(f"{cell:>{_WIDTH}}" for cell in cells)
        lines.append(line.rstrip())
    return "\n".join(lines)


def main() -> None:
    for policy in ("decode_first", "prefill_first"):
        print(f'step_policy="{policy}"\n\n{draw(simulate(EXAMPLE, step_policy=policy))}\n')


if __name__ == "__main__":
    main()
