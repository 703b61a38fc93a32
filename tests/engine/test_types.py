from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import pytest

from engine.types import (
    BlockManager,
    BlockUpdate,
    KVGeometry,
    ModelRunner,
    NewRequest,
    PrefillChunk,
    Scheduler,
    StepHandle,
    StepPlan,
    StepResult,
)
from sampling_params import SamplingParams

PLAN = StepPlan(
    7,
    (NewRequest(2, 40, (5, 6, 7), SamplingParams(temperature=0.5, seed=3), 3),),
    (BlockUpdate(2, 0, (9,)), BlockUpdate(0, 4, (8,))),
    (PrefillChunk(2, 0, 3, True), PrefillChunk(1, 16, 10, False)),
    (0, 5),
)


def test_plan_counts_its_tokens() -> None:
    assert PLAN.num_prefill_tokens == 13
    assert PLAN.num_tokens == 15


def test_sampled_slots_are_ended_prefills_then_decodes() -> None:
    assert PLAN.sampled_slots == [2, 0, 5]


def test_an_empty_plan_computes_nothing() -> None:
    assert (StepPlan(0).num_tokens, StepPlan(0).sampled_slots) == (0, [])


def test_plans_and_results_survive_pickling() -> None:
    for value in (PLAN, StepResult(7, [[1], [2, 3]], 0.5), KVGeometry(2, 2, 64, 16, 8, 4)):
        assert pickle.loads(pickle.dumps(value)) == value


def test_plans_are_hashable_and_frozen() -> None:
    assert hash(PLAN) == hash(pickle.loads(pickle.dumps(PLAN)))
    with pytest.raises(FrozenInstanceError):
        PLAN.step_id = 8  # type: ignore[misc]


def test_bytes_of_a_block() -> None:
    # 3 layers, 16 tokens, K and V, 2 heads of 64 elements of 2 bytes.
    assert KVGeometry(3, 2, 64, 16, 10, 2).bytes_per_block == 3 * 16 * 2 * 2 * 64 * 2


@pytest.mark.parametrize("contract", [BlockManager, Scheduler, ModelRunner, StepHandle])
def test_contracts_cannot_be_constructed(contract: type) -> None:
    with pytest.raises(TypeError, match="abstract"):
        contract()
