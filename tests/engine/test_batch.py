"""Plans as tensors, against a table kept by hand."""

from __future__ import annotations

import pytest
import torch
from engine.batch import SlotTables

from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepPlan
from sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)
RANDOM = SamplingParams(temperature=0.5)


def _tables(num_slots: int = 4) -> SlotTables:
    return SlotTables(num_slots, 64, 16, torch.device("cpu"))


def _new(slot: int, num_tokens: int, params: SamplingParams = GREEDY, seed: int = 0) -> NewRequest:
    tokens = tuple(range(100 * slot, 100 * slot + num_tokens))
    return NewRequest(slot, slot, tokens, params, seed)


# Slot 2 has 20 tokens in blocks 7 and 3, slot 0 has 5 in block 9.
FIRST = StepPlan(
    0,
    (_new(2, 20), _new(0, 5, RANDOM, 2**62 + 1)),
    (BlockUpdate(2, 0, (7, 3)), BlockUpdate(0, 0, (9,))),
    (PrefillChunk(2, 0, 18, False), PrefillChunk(0, 0, 5, True)),
)


def test_prefill_rows_are_tokens_positions_and_pages() -> None:
    inputs = _tables().stage(FIRST)
    assert inputs.input_ids.tolist() == [*range(200, 218), *range(5)]
    assert inputs.positions.tolist() == [*range(18), *range(5)]
    pages = [*range(7 * 16, 8 * 16), 3 * 16, 3 * 16 + 1, *range(9 * 16, 9 * 16 + 5)]
    assert inputs.slot_mapping.tolist() == pages
    attention = inputs.attention
    assert attention.slots.tolist() == [2, 0]
    assert attention.context_lens.tolist() == [18, 5]
    assert attention.query_start.tolist() == [0, 18, 23]
    assert (attention.num_prefills, attention.num_prefill_tokens) == (2, 23)
    assert attention.max_query_len == 18


def test_only_rows_that_sample_are_sampled() -> None:
    inputs = _tables().stage(FIRST)
    assert inputs.sampled_rows is not None
    assert inputs.sampled_rows.tolist() == [22]
    assert inputs.sampled_slots.tolist() == [0]
    assert inputs.sampled_positions.tolist() == [5]


def test_a_sampled_token_is_the_next_input() -> None:
    tables = _tables()
    tables.write_back(tables.stage(FIRST), torch.tensor([77]))
    inputs = tables.stage(StepPlan(1, prefill=(PrefillChunk(2, 18, 2, True),), decode=(0,)))
    assert inputs.input_ids.tolist() == [218, 219, 77]
    assert inputs.positions.tolist() == [18, 19, 5]
    assert inputs.slot_mapping.tolist() == [3 * 16 + 2, 3 * 16 + 3, 9 * 16 + 5]
    assert inputs.attention.context_lens.tolist() == [20, 6]
    assert inputs.sampled_rows is not None
    assert inputs.sampled_rows.tolist() == [1, 2]
    tables.write_back(inputs, torch.tensor([78, 79]))
    inputs = tables.stage(StepPlan(2, decode=(0, 2)))
    assert inputs.input_ids.tolist() == [79, 78]
    assert inputs.positions.tolist() == [6, 20]
    assert inputs.sampled_positions.tolist() == [7, 21]
    assert inputs.sampled_rows is None


def test_a_new_block_is_used_from_its_first_position() -> None:
    tables = _tables()
    plan = StepPlan(0, (_new(1, 16),), (BlockUpdate(1, 0, (5,)),), (PrefillChunk(1, 0, 16, True),))
    tables.write_back(tables.stage(plan), torch.tensor([1]))
    inputs = tables.stage(StepPlan(1, block_updates=(BlockUpdate(1, 1, (2,)),), decode=(1,)))
    assert inputs.slot_mapping.tolist() == [2 * 16]


def test_a_slot_is_taken_over_by_another_request() -> None:
    tables = _tables()
    tables.write_back(tables.stage(FIRST), torch.tensor([77]))
    plan = StepPlan(
        1,
        (NewRequest(0, 9, (41, 42), GREEDY, 3),),
        (BlockUpdate(0, 0, (1,)),),
        (PrefillChunk(0, 0, 2, True),),
    )
    inputs = tables.stage(plan)
    assert inputs.input_ids.tolist() == [41, 42]
    assert inputs.slot_mapping.tolist() == [16, 17]
    assert tables.seeds[0] == 3


def test_seeds_and_temperatures_reach_the_tables() -> None:
    tables = _tables()
    tables.stage(FIRST)
    assert tables.seeds[0] == 2**62 + 1
    assert tables.temperatures[[0, 2]].tolist() == [0.5, 0.0]


@pytest.mark.parametrize(("decode", "greedy"), [((1,), True), ((0,), False), ((0, 1), False)])
def test_a_step_is_greedy_if_all_that_it_samples_is(decode: tuple[int, ...], greedy: bool) -> None:
    tables = _tables()
    plan = StepPlan(
        0,
        (_new(0, 2, RANDOM), _new(1, 2)),
        (BlockUpdate(0, 0, (0,)), BlockUpdate(1, 0, (1,))),
        (PrefillChunk(0, 0, 2, True), PrefillChunk(1, 0, 2, True)),
    )
    tables.write_back(tables.stage(plan), torch.tensor([1, 2]))
    assert tables.all_greedy(StepPlan(1, decode=decode)) == greedy


def test_a_slot_is_greedy_again_with_a_greedy_request() -> None:
    """Sampling at temperature zero would give the same tokens, at the price of the noise."""
    tables = _tables()
    for params, greedy in ((RANDOM, False), (GREEDY, True)):
        plan = StepPlan(
            0,
            (_new(0, 2, params),),
            (BlockUpdate(0, 0, (0,)),),
            (PrefillChunk(0, 0, 2, True),),
        )
        tables.stage(plan)
        assert tables.all_greedy(plan) == greedy


def test_the_padding_slot_belongs_to_no_request() -> None:
    assert _tables(4).padding_slot == 4


def test_decode_slots_are_padded_for_a_captured_batch() -> None:
    tables = _tables()
    slots = torch.full((4,), -1)
    tables.stage_changes(StepPlan(0, decode=(3, 1)), slots)
    assert slots.tolist() == [3, 1, 4, 4]
