"""Which plans run as graphs, and what becomes of a plan with both kinds of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.captured_steps import CapturedSteps
from engine.extras import StepLogits
from torch import Tensor

from engine.types import BlockUpdate, PrefillChunk, StepPlan


class _Step:
    """Stands in for a captured step: row i's token is `first` + i, and its logits are that."""

    def __init__(self, first: int, kind: str) -> None:
        self._first = first
        self._kind = kind
        self.plans: list[StepPlan] = []
        self.stored: list[int] = []

    def fits(self, plan: StepPlan) -> bool:
        return plan.num_prefill_tokens <= 4096

    def capture(self, *sizes: Any) -> None: ...

    def run_padding(self, size: int | None = None) -> None: ...

    def run(self, plan: StepPlan) -> Tensor:
        self.plans.append(plan)
        chunks = sum(chunk.samples for chunk in plan.prefill)
        rows = chunks if self._kind == "prefill" else len(plan.decode)
        return torch.arange(self._first, self._first + rows)

    def run_to_logits(self, plan: StepPlan) -> StepLogits:
        tokens = self.run(plan)
        # As the decode step has it: int32 where the prefill step has int64.
        small = tokens.int() if self._kind == "decode" else tokens
        keys = (tokens / 10, tokens + 1, small + 2)
        return StepLogits(
            tokens[:, None].float(), small, keys, lambda drawn: self.stored.extend(drawn.tolist())
        )


def _steps(weights_per_layer: int = 1 << 20) -> tuple[CapturedSteps, _Step, _Step]:
    decode, prefill = _Step(100, "decode"), _Step(200, "prefill")
    steps = CapturedSteps(decode, prefill, weights_per_layer)  # type: ignore[arg-type]
    steps.capture(8)
    return steps, decode, prefill


def _plan(tokens: int = 5, decode: tuple[int, ...] = (3, 4)) -> StepPlan:
    chunks = (PrefillChunk(0, 0, tokens - 1, True), PrefillChunk(1, 0, 1, False))
    return StepPlan(7, (), (BlockUpdate(3, 1, (9,)),), chunks if tokens else (), decode)


def test_a_plan_of_both_runs_as_two_steps_with_its_changes_in_the_first() -> None:
    steps, decode, prefill = _steps()
    plan = _plan()
    assert steps.serves(plan)
    assert steps.run(plan).tolist() == [200, 100, 101]
    assert prefill.plans == [plan]
    assert decode.plans == [StepPlan(7, decode=(3, 4))]


def test_a_plan_of_one_kind_runs_whole() -> None:
    steps, decode, prefill = _steps()
    assert steps.run(_plan(decode=())).tolist() == [200]
    assert not decode.plans
    plan = _plan(tokens=0)
    assert steps.run(plan).tolist() == [100, 101]
    assert decode.plans == [plan]
    assert len(prefill.plans) == 1


def test_logits_of_both_kinds_are_joined_and_their_tokens_stored_apart() -> None:
    steps, decode, prefill = _steps()
    step = steps.run_to_logits(_plan())
    assert step.logits.tolist() == [[200.0], [100.0], [101.0]]
    assert step.slots.tolist() == [200, 100, 101]
    temperatures, seeds, positions = step.keys
    assert temperatures.tolist() == pytest.approx([20.0, 10.0, 10.1])
    assert seeds.tolist() == [201, 101, 102]
    assert positions.tolist() == [202, 102, 103]
    step.store(torch.tensor([1, 2, 3]))
    assert prefill.stored == [1]
    assert decode.stored == [2, 3]


def test_beside_decodes_prefills_are_captured_while_launching_them_takes_longer() -> None:
    small, _, _ = _steps(weights_per_layer=16_000_000)
    assert small.serves(_plan(4096))
    assert not small.serves(_plan(4097))
    large, _, _ = _steps(weights_per_layer=220_000_000)
    # 0.4 ms are 110 us for the weights once more, and 396 tokens at 600 TFLOP/s.
    assert large.serves(_plan(395))
    assert not large.serves(_plan(397))
    assert large.serves(_plan(4096, decode=()))
    huge, _, _ = _steps(weights_per_layer=1 << 30)
    assert not huge.serves(_plan())
    assert huge.serves(_plan(tokens=0))


def test_nothing_is_served_before_it_is_captured() -> None:
    decode = _Step(100, "decode")
    steps = CapturedSteps(decode, _Step(200, "prefill"), 1)  # type: ignore[arg-type]
    assert not steps.serves(_plan(tokens=0))
    # Sizes up to the limit, the largest decode and the largest prefill.
    assert len(steps.rehearsals(24)) == 2 + 2
