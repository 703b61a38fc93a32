"""Plans as rows, against a table kept by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.device_state import DeviceState, Staging, chunks_header, header_of
from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepPlan
from layers.step_rows import SlotTables, StepRows
from sampling_params import SamplingParams
from utils.errors import ContractError

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0)
RANDOM = SamplingParams(temperature=0.5)


class State(DeviceState):
    """Per-slot tables on a CPU that take in each plan before they make its rows."""

    def __init__(self, num_slots: int = 4) -> None:
        super().__init__(SlotTables.zeros(num_slots, 64, 16, CPU), Staging(CPU))

    def staged(self, plan: StepPlan) -> StepRows:
        self.apply(plan)
        return self.rows(plan)

    def run(self, plan: StepPlan, tokens: list[int]) -> StepRows:
        rows = self.staged(plan)
        self.write(rows.sampled, torch.tensor(tokens))
        assert rows.sampled.tokens.tolist() == tokens
        return rows


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
    rows = State().staged(FIRST)
    assert rows.input_ids.tolist() == [*range(200, 218), *range(5)]
    assert rows.positions.tolist() == [*range(18), *range(5)]
    pages = [*range(7 * 16, 8 * 16), 3 * 16, 3 * 16 + 1, *range(9 * 16, 9 * 16 + 5)]
    assert rows.slot_mapping[0].tolist() == pages
    tables = torch.zeros(1)
    attention = rows.attention(tables)
    assert attention.block_tables is tables
    assert attention.slots.tolist() == [2, 0]
    assert attention.context_lens.tolist() == [18, 5]
    assert attention.query_start.tolist() == [0, 18, 23]
    assert (attention.num_prefills, attention.num_prefill_tokens) == (2, 23)
    assert (attention.max_query_len, attention.rows_per_decode) == (18, 1)


def test_only_rows_that_sample_are_sampled() -> None:
    sampled = State().staged(FIRST).sampled
    assert sampled.rows.tolist() == [22]
    assert sampled.slots.tolist() == [0]
    assert sampled.positions.tolist() == [5]
    assert sampled.temperatures.tolist() == [0.5]
    assert sampled.seeds.tolist() == [[2**62 + 1, 0]]


def test_a_sampled_token_is_the_next_input() -> None:
    state = State()
    state.run(FIRST, [77])
    plan = StepPlan(1, prefill=(PrefillChunk(2, 18, 2, True),), decode=(0,))
    rows = state.run(plan, [78, 79])
    assert rows.input_ids.tolist() == [218, 219, 77]
    assert rows.positions.tolist() == [18, 19, 5]
    assert rows.slot_mapping[0].tolist() == [3 * 16 + 2, 3 * 16 + 3, 9 * 16 + 5]
    assert rows.context_lens.tolist() == [20, 6]
    assert rows.sampled.rows.tolist() == [1, 2]
    # The second one makes its rows anew of the same header.
    for step, ids in ((2, [79, 78]), (3, [80, 81])):
        rows = state.run(StepPlan(step, decode=(0, 2)), [80, 81])
        assert rows.input_ids.tolist() == ids
        assert rows.positions.tolist() == [4 + step, 18 + step]
        assert rows.context_lens.tolist() == [5 + step, 19 + step]
        assert rows.sampled.positions.tolist() == [5 + step, 19 + step]
        assert rows.sampled.slots.tolist() == rows.slots.tolist() == [0, 2]
        assert rows.sampled.rows.tolist() == [0, 1]
        assert rows.sampled.temperatures.tolist() == [0.5, 0.0]


def test_a_prompt_beside_the_decodes_of_the_step_before_is_computed() -> None:
    """The rows of those decodes are kept from step to step, and do not stand for the whole plan."""
    state = State()
    state.run(FIRST, [77])
    state.run(StepPlan(1, decode=(0,)), [78])
    rows = state.run(StepPlan(2, prefill=(PrefillChunk(2, 18, 2, True),), decode=(0,)), [79, 80])
    assert rows.input_ids.tolist() == [218, 219, 78]
    assert rows.positions.tolist() == [18, 19, 6]
    rows = state.run(StepPlan(3, decode=(0,)), [81])
    assert rows.input_ids.tolist() == [80]
    assert rows.positions.tolist() == [7]


def test_a_new_block_is_used_from_its_first_position() -> None:
    state = State()
    plan = StepPlan(0, (_new(1, 16),), (BlockUpdate(1, 0, (5,)),), (PrefillChunk(1, 0, 16, True),))
    state.run(plan, [1])
    rows = state.staged(StepPlan(1, block_updates=(BlockUpdate(1, 1, (2,)),), decode=(1,)))
    assert rows.slot_mapping[0].tolist() == [2 * 16]


def test_a_slot_is_taken_over_by_another_request() -> None:
    state = State()
    state.run(FIRST, [77])
    state.run(StepPlan(1, decode=(0,)), [78])
    plan = StepPlan(
        2,
        (NewRequest(0, 9, (41, 42), GREEDY, 3),),
        (BlockUpdate(0, 0, (1,)),),
        (PrefillChunk(0, 0, 2, True),),
    )
    rows = state.run(plan, [43])
    assert rows.input_ids.tolist() == [41, 42]
    assert rows.slot_mapping[0].tolist() == [16, 17]
    assert rows.sampled.seeds.tolist() == [[3, 0]]
    rows = state.staged(StepPlan(3, decode=(0,)))
    assert rows.input_ids.tolist() == [43]
    assert rows.sampled.seeds.tolist() == [[3, 0]]
    assert rows.sampled.temperatures.tolist() == [0.0]


@pytest.mark.parametrize(("decode", "greedy"), [((1,), True), ((0,), False), ((0, 1), False)])
def test_a_step_is_greedy_if_all_that_it_samples_is(decode: tuple[int, ...], greedy: bool) -> None:
    state = State()
    plan = StepPlan(
        0,
        (_new(0, 2, RANDOM), _new(1, 2)),
        (BlockUpdate(0, 0, (0,)), BlockUpdate(1, 0, (1,))),
        (PrefillChunk(0, 0, 2, True), PrefillChunk(1, 0, 2, True)),
    )
    state.run(plan, [1, 2])
    assert state.all_greedy(StepPlan(1, decode=decode)) == greedy


def test_a_slot_is_greedy_again_with_a_greedy_request() -> None:
    """Sampling at temperature zero would give the same tokens, at the price of the noise."""
    state = State()
    for params, greedy in ((RANDOM, False), (GREEDY, True)):
        plan = StepPlan(
            0,
            (_new(0, 2, params),),
            (BlockUpdate(0, 0, (0,)),),
            (PrefillChunk(0, 0, 2, True),),
        )
        state.staged(plan)
        assert state.all_greedy(plan) == greedy


def test_decodes_of_several_rows_start_where_the_last_step_ended() -> None:
    state = State()
    state.run(FIRST, [77])
    state.run(StepPlan(1, prefill=(PrefillChunk(2, 18, 2, True),)), [78])
    header = torch.from_numpy(header_of([(2, -1, 3, 3), (0, -1, 3, 3)]))
    rows = StepRows.empty(header, 6, 6, rows_per_decode=3)
    state.fill(rows)
    assert rows.positions.tolist() == [20, 21, 22, 5, 6, 7]
    assert rows.input_ids.tolist() == [78, 0, 0, 77, 0, 0]
    assert rows.slot_mapping[0].tolist() == [52, 53, 54, 149, 150, 151]
    assert rows.context_lens.tolist() == [23, 8]
    assert rows.sampled.rows.tolist() == list(range(6))
    assert rows.sampled.positions.tolist() == [21, 22, 23, 6, 7, 8]
    assert rows.sampled.temperatures.tolist() == [0.0] * 3 + [0.5] * 3


def test_the_padding_slot_belongs_to_no_request() -> None:
    assert State(4).tables.padding_slot == 4


def test_of_rows_of_captured_chunks_any_number_may_be_one_chunk() -> None:
    """A replay brings another header, and how many programs run is fixed before it."""
    whole = StepRows.empty(torch.zeros(6, 3, dtype=torch.int64), 40, 2, num_chunks=2)
    part = whole.first_rows(24)
    assert (part.num_chunk_rows, part.longest_chunk) == (24, 24)
    attention = part.attention(torch.zeros(1))
    assert (attention.num_prefills, attention.num_prefill_tokens) == (2, 24)
    assert attention.max_query_len == 24
    # The third request owns the padding, and a backend must not take it for a decode.
    assert len(attention.slots) == len(attention.context_lens) == 2
    for name in ("input_ids", "positions", "slot_mapping"):
        ours, all_of_them = getattr(part, name), getattr(whole, name)
        if name == "slot_mapping":
            (ours,), (all_of_them,) = ours, all_of_them
        assert len(ours) == 24
        assert ours.data_ptr() == all_of_them.data_ptr()


def test_the_first_decodes_have_all_their_rows() -> None:
    whole = StepRows.empty(torch.zeros(6, 5, dtype=torch.int64), 15, 15, rows_per_decode=3)
    part = whole.first_decodes(2)
    assert [len(part.input_ids), len(part.positions), len(part.slot_mapping[0])] == [6, 6, 6]
    assert [len(part.slots), len(part.context_lens), len(part.query_start)] == [2, 2, 3]
    assert len(part.sampled.rows) == len(part.sampled.tokens) == 6
    assert part.header.shape == (6, 2)
    attention = part.attention(torch.zeros(1))
    assert (attention.num_prefills, attention.num_prefill_tokens) == (0, 0)
    assert attention.rows_per_decode == 3


def test_a_header_puts_rows_and_samples_in_order() -> None:
    header = header_of([(3, 0, 7, 0), (1, 5, 2, 1), (0, -1, 3, 3), (2, -1, 3, 3)])
    assert header.tolist() == [
        [3, 1, 0, 2],
        [0, 5, -1, -1],
        [7, 2, 3, 3],
        [0, 7, 9, 12],
        [-1, 0, 1, 4],
        [0, 1, 3, 3],
    ]


@pytest.mark.parametrize("samples", [(), (True,), (False,), (True, False, True), (False,) * 4])
def test_chunks_of_a_captured_step_have_their_samples_at_the_end(samples: Any) -> None:
    """Every place is somebody's: a sampled row's, or padding's."""
    chunks = tuple(PrefillChunk(i, 10 * i, i + 1, sample) for i, sample in enumerate(samples))
    header = chunks_header(chunks, 4, 40, 9)
    count, tokens = len(chunks), sum(c.num_tokens for c in chunks)
    assert header.shape == (6, 5)
    assert header[0].tolist() == [*range(count), *[9] * (5 - count)]
    assert header[1, :count].tolist() == [10 * i for i in range(count)]
    assert header[2].tolist() == [*range(1, count + 1), *[0] * (4 - count), 40 - tokens]
    assert np.array_equal(header[3], np.cumsum(header[2]) - header[2])
    places = header[4, :4].tolist()
    assert sorted(places) == [0, 1, 2, 3]
    assert header[4, 4] == -1
    sampled = [place for place, sample in zip(places, samples, strict=False) if sample]
    assert sampled == list(range(4 - sum(samples), 4))
    assert header[5].tolist() == [*map(int, samples), *[0] * (5 - count)]


def test_a_block_table_beyond_the_length_limit_is_refused() -> None:
    """It would go on in the table of the next slot, which belongs to another request."""
    state = State()
    width = state.tables.block_tables[0].shape[1]
    state.staged(StepPlan(0, block_updates=(BlockUpdate(1, width - 1, (5,)),)))
    with pytest.raises(ContractError, match=f"more than {width} entries"):
        state.staged(StepPlan(1, block_updates=(BlockUpdate(1, width - 1, (5, 6)),)))
