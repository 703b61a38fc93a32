"""Slots, blocks and plans as a scheduler author meets them; no torch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from config import Config
from engine.requests import Sequence
from engine.running_batch import RunningBatch
from engine.types import (
    BlockUpdate,
    KVGeometry,
    NewRequest,
    PrefillChunk,
    RowReport,
    SeedKind,
    StepPlan,
    StepResult,
)
from memory.block_manager import PagedBlockManager
from sampling_params import SamplingParams
from utils.errors import ContractError

PARAMS = SamplingParams(temperature=0.5)


class PublishingBlocks(PagedBlockManager):
    """Remembers what was published, and finds the first `cached` tokens of any prompt cached."""

    def __init__(self, num_blocks: int, cached: int = 0) -> None:
        super().__init__(Config(model="none"), KVGeometry(1, 1, 1, 16, num_blocks, 4))
        self.published: list[tuple[int, int, int]] = []
        self.cached = cached

    def begin(self, request_id: int, token_ids: list[int], cache_salt: str = "") -> int:
        super().begin(request_id, token_ids)
        super().grow(request_id, self.cached)
        return self.cached

    def commit(self, request_id: int, token_ids: list[int], num_computed: int) -> None:
        self.published.append((request_id, len(token_ids), num_computed))


def _batch(
    num_blocks: int = 8, slots: int = 2, cached: int = 0
) -> tuple[RunningBatch, PublishingBlocks]:
    blocks = PublishingBlocks(num_blocks, cached)
    return RunningBatch(blocks, slots, lambda: 0.0), blocks


def _seq(num_prompt: int, request_id: int = 0, max_total: int = 100, stop: int = -1) -> Sequence:
    return Sequence(
        request_id,
        list(range(num_prompt)),
        PARAMS,
        max_total_tokens=max_total,
        stop_token_ids=frozenset({stop}),
        seed=9,
    )


def _built(batch: RunningBatch) -> StepPlan:
    plan = batch.build()
    assert plan is not None
    return plan


def test_the_plan_of_an_admission_carries_prompt_blocks_and_chunk() -> None:
    batch, _ = _batch()
    seq = _seq(20)
    assert batch.admit(seq)
    batch.prefill(seq, 20)
    assert _built(batch) == StepPlan(
        0,
        (NewRequest(0, 0, tuple(range(20)), PARAMS, 9, max_total_tokens=100),),
        (BlockUpdate(0, 0, (0, 1)),),
        (PrefillChunk(0, 0, 20, True),),
        (),
    )


def test_nothing_to_compute_builds_no_plan() -> None:
    batch, _ = _batch()
    assert batch.build() is None
    assert batch.num_in_flight == 0


def test_an_admission_without_rows_waits_for_the_next_plan() -> None:
    batch, _ = _batch()
    seq = _seq(5)
    batch.admit(seq)
    assert batch.build() is None
    batch.prefill(seq, 5)
    assert len(_built(batch).new_requests) == 1


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (33, 3)])
def test_blocks_for(num_tokens: int, blocks: int) -> None:
    assert _batch()[0].blocks_for(num_tokens) == blocks


def test_admission_without_a_free_slot_changes_nothing() -> None:
    batch, blocks = _batch(slots=1)
    batch.admit(_seq(5))
    free = blocks.num_free_blocks
    other = _seq(5, request_id=1)
    assert not batch.admit(other)
    assert (blocks.num_free_blocks, other.slot, batch.num_running) == (free, None, 1)


def test_admission_without_enough_blocks_changes_nothing() -> None:
    batch, blocks = _batch(num_blocks=2)
    seq = _seq(33)
    assert not batch.admit(seq)
    assert (blocks.num_free_blocks, seq.slot, batch.num_running) == (2, None, 0)
    assert batch.admit(_seq(32))


def test_cached_tokens_are_neither_computed_nor_published_again() -> None:
    batch, blocks = _batch(cached=32)
    seq = _seq(40)
    batch.admit(seq)
    assert (seq.num_scheduled, seq.num_committed) == (32, 32)
    batch.prefill(seq, 8)
    plan = _built(batch)
    assert plan.prefill == (PrefillChunk(0, 32, 8, True),)
    assert plan.block_updates == (BlockUpdate(0, 0, (0, 1, 2)),)
    batch.commit(plan, StepResult(0, [[5]], 0.0))
    assert blocks.published == []


def test_reserve_takes_a_block_only_at_a_border() -> None:
    batch, blocks = _batch()
    seq = _seq(15)
    batch.admit(seq)
    batch.prefill(seq, 15)
    assert batch.reserve(seq)
    assert blocks.num_free_blocks == 7
    batch.decode([seq])
    batch.build()
    assert batch.reserve(seq)
    assert blocks.num_free_blocks == 6
    batch.decode([seq])
    assert _built(batch).block_updates == (BlockUpdate(0, 1, (1,)),)


def test_reserve_without_blocks_changes_nothing() -> None:
    batch, _ = _batch(num_blocks=1)
    seq = _seq(16)
    batch.admit(seq)
    batch.prefill(seq, 16)
    assert not batch.reserve(seq)
    assert (seq.capacity, seq.num_scheduled) == (16, 16)


def test_a_reservation_is_sent_with_the_next_plan_even_if_planning_was_given_up() -> None:
    batch, _ = _batch()
    seq = _seq(16)
    batch.admit(seq)
    batch.prefill(seq, 16)
    batch.build()
    assert batch.reserve(seq)
    assert batch.build() is None
    batch.decode([seq])
    assert _built(batch).block_updates == (BlockUpdate(0, 1, (1,)),)


def test_reservations_of_one_plan_add_up() -> None:
    batch, _ = _batch()
    seq = _seq(16)
    batch.admit(seq)
    batch.prefill(seq, 16)
    assert batch.reserve(seq)
    assert batch.reserve(seq, 17)
    assert _built(batch).block_updates == (BlockUpdate(0, 0, (0, 1, 2)),)


def test_nothing_is_reserved_beyond_the_length_limit() -> None:
    """The last token is sampled and never computed."""
    batch, blocks = _batch()
    seq = _seq(14, max_total=17)
    batch.admit(seq)
    assert batch.reserve(seq, 9)
    batch.prefill(seq, 14)
    assert batch.reserve(seq, 9)
    assert blocks.num_free_blocks == 7


def test_full_blocks_are_published_once_they_are_committed() -> None:
    batch, blocks = _batch()
    seq = _seq(30)
    batch.admit(seq)
    batch.prefill(seq, 10)
    first = _built(batch)
    batch.prefill(seq, 20)
    second = _built(batch)
    assert blocks.published == []
    batch.commit(first, StepResult(0, [], 0.0))
    assert blocks.published == []
    batch.commit(second, StepResult(1, [[7]], 0.0))
    assert blocks.published == [(0, 31, 30)]
    for step in range(2, 4):
        batch.decode([seq])
        batch.commit(_built(batch), StepResult(step, [[7]], 0.0))
    assert blocks.published == [(0, 31, 30), (0, 33, 32)]


def test_several_tokens_of_one_step_stop_at_the_first_end() -> None:
    batch, _, seq = _running(4, stop=50)
    batch.decode([seq], 3)
    assert batch.commit(_built(batch), StepResult(1, [[8, 50, 9]], 0.0)) == [seq]
    assert (seq.output_token_ids, seq.finish_reason) == ([7, 8, 50], "stop")


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (StepResult(2, [[1]], 0.0), r"\(2, 1, 1, \d\) instead of \(1, 1, 1"),
        (StepResult(1, [], 0.0), r"\(1, 0, 1, \d\) instead of \(1, 1, 1"),
        (StepResult(1, [[1], [2]], 0.0), r"\(1, 2, 1, \d\) instead of \(1, 1, 1"),
        (StepResult(1, [[1]], 0.0, None, [[]]), r"\(1, 1, 1, 1\) instead of \(1, 1, 1, 0"),
        (StepResult(1, [[]], 0.0), "row 0: 0 tokens of 3 positions"),
        (StepResult(1, [[1, 2, 3, 4]], 0.0), "row 0: 4 tokens of 3 positions"),
        (StepResult(1, [[1, 2]], 0.0, []), r"\(1, 1, 0, \d\) instead of \(1, 1, 1"),
        (StepResult(1, [[1, 2]], 0.0, [[{1: 0.0}]]), "2 tokens .* 1 log-probabilities"),
    ],
)
def test_a_result_that_is_not_the_plan_s_is_refused(result: StepResult, problem: str) -> None:
    batch, _, seq = _running()
    batch.decode([seq], 3)
    with pytest.raises(ContractError, match=problem):
        batch.commit(_built(batch), result)


def test_two_tokens_where_one_was_planned() -> None:
    batch, _, seq = _running()
    batch.decode([seq])
    with pytest.raises(ContractError, match="2 tokens of 1 positions"):
        batch.commit(_built(batch), StepResult(1, [[1, 2]], 0.0))


def test_a_finished_request_keeps_slot_and_blocks_while_in_flight() -> None:
    batch, blocks = _batch()
    seq = _seq(4)
    batch.admit(seq)
    batch.prefill(seq, 4)
    plan = _built(batch)
    batch.finish(seq, "abort")
    assert (seq.slot, batch.num_running, blocks.num_free_blocks) == (0, 1, 7)
    assert batch.commit(plan, StepResult(0, [[1]], 0.0)) == []
    assert (seq.slot, batch.num_running, blocks.num_free_blocks) == (None, 0, 8)


def test_a_request_in_flight_cannot_be_preempted() -> None:
    batch, _ = _batch()
    seq = _seq(4)
    batch.admit(seq)
    batch.prefill(seq, 4)
    with pytest.raises(AssertionError, match="in flight"):
        batch.preempt(seq)


def test_preemption_forgets_what_was_computed_and_keeps_the_output() -> None:
    batch, blocks = _batch()
    seq = _seq(4)
    batch.admit(seq)
    batch.prefill(seq, 4)
    batch.commit(_built(batch), StepResult(0, [[42]], 0.0))
    batch.preempt(seq)
    assert (seq.slot, seq.num_scheduled, seq.num_committed, seq.capacity) == (None, 0, 0, 0)
    assert (seq.num_preemptions, seq.token_ids) == (1, [0, 1, 2, 3, 42])
    assert blocks.num_free_blocks == 8
    assert batch.admit(seq)
    assert seq.num_prefill == 5


def test_a_preempted_request_says_how_many_of_its_tokens_are_output() -> None:
    batch, _ = _batch()
    seq = _seq(4)
    batch.admit(seq)
    batch.prefill(seq, 4)
    first = _built(batch)
    batch.commit(first, StepResult(0, [[42]], 0.0))
    batch.preempt(seq)
    batch.admit(seq)
    batch.prefill(seq, 5)
    (again,) = _built(batch).new_requests
    assert [first.new_requests[0].num_output_tokens, again.num_output_tokens] == [0, 1]
    assert again.token_ids == (0, 1, 2, 3, 42)


def test_a_slot_that_was_given_up_before_the_plan_has_no_blocks_in_it() -> None:
    batch, _ = _batch()
    stays, gone = _seq(5), _seq(20, request_id=1)
    batch.admit(stays)
    batch.admit(gone)
    batch.finish(gone, "abort")
    batch.prefill(stays, 5)
    plan = _built(batch)
    assert [new.request_id for new in plan.new_requests] == [0]
    assert plan.block_updates == (BlockUpdate(0, 0, (0,)),)


def test_a_request_admitted_and_ended_before_the_plan_leaves_no_trace_in_it() -> None:
    batch, _ = _batch()
    gone, stays = _seq(20), _seq(5, request_id=1)
    batch.admit(gone)
    batch.finish(gone, "abort")
    batch.admit(stays)
    batch.prefill(stays, 5)
    plan = _built(batch)
    assert [new.request_id for new in plan.new_requests] == [1]
    assert len(plan.block_updates) == 1


def _running(
    num_prompt: int = 4, **options: int
) -> tuple[RunningBatch, PublishingBlocks, Sequence]:
    """A request whose prompt has been computed and committed, with one token of output."""
    batch, blocks = _batch()
    seq = _seq(num_prompt, **options)
    batch.admit(seq)
    batch.prefill(seq, num_prompt)
    batch.commit(_built(batch), StepResult(0, [[7]], 0.0))
    return batch, blocks, seq


def test_what_is_committed_rises_by_what_was_kept() -> None:
    batch, blocks, seq = _running(14)
    batch.decode([seq], 4)
    plan = _built(batch)
    assert (plan.decode_tokens, plan.num_tokens, seq.num_scheduled) == ((4,), 4, 18)
    batch.commit(plan, StepResult(1, [[8]], 0.0))
    assert (seq.num_committed, seq.num_scheduled, seq.num_drafted) == (15, 15, 0)
    assert blocks.published == []
    batch.decode([seq], 4)
    batch.commit(_built(batch), StepResult(2, [[1, 2, 3]], 0.0))
    assert (seq.num_committed, seq.token_ids[14:]) == (18, [7, 8, 1, 2, 3])
    assert blocks.published == [(0, 19, 18)]


def test_plans_of_one_position_a_row_are_as_they_were() -> None:
    batch, _, seq = _running()
    batch.decode([seq])
    plan = _built(batch)
    assert (plan.decode_tokens, plan.decode_counts, plan.num_tokens) == ((), (1,), 1)


def test_blocks_are_reserved_for_the_latest_start_in_flight() -> None:
    batch, _, seq = _running(12)
    batch.decode([seq], 3)
    assert _built(batch).block_updates == ()
    # 12 to 15 positions are computed then: up to 18 with three more.
    batch.decode([seq], 3)
    assert _built(batch).block_updates == (BlockUpdate(0, 1, (1,)),)
    assert (seq.num_scheduled, seq.num_drafted) == (18, 4)


def test_drafts_take_nobody_s_blocks() -> None:
    batch, _ = _batch(num_blocks=1)
    seq = _seq(12)
    batch.admit(seq)
    batch.prefill(seq, 12)
    batch.commit(_built(batch), StepResult(0, [[7]], 0.0))
    batch.decode([seq], 9)
    plan = _built(batch)
    assert (plan.decode_tokens, plan.block_updates) == ((4,), ())


def test_a_request_that_may_have_reached_its_limit_waits_and_goes_on() -> None:
    batch, _, seq = _running(4, max_total=8)
    batch.decode([seq], 3)
    plan = _built(batch)
    assert plan.decode_tokens == (3,)
    assert seq.request_id not in batch.decoding
    batch.commit(plan, StepResult(1, [[1]], 0.0))
    assert list(batch.decoding) == [seq.request_id]
    batch.decode([seq], 3)
    plan = _built(batch)
    # Position 7 would be that of the last token, which is never computed.
    assert plan.decode_tokens == (2,)
    assert batch.commit(plan, StepResult(2, [[2, 3]], 0.0)) == [seq]
    assert (seq.output_token_ids, seq.finish_reason) == ([7, 1, 2, 3], "length")


def test_a_row_may_reach_the_limit_from_its_earliest_start() -> None:
    """The runner cuts it if it starts later, so no step is lost if it does not."""
    batch, _, seq = _running(4, max_total=12)
    batch.decode([seq], 4)
    _built(batch)
    # 5 to 8 positions are computed then, of 11.
    batch.decode([seq], 9)
    plan = _built(batch)
    assert plan.decode_tokens == (6,)
    assert (seq.num_scheduled, seq.capacity) == (14, 16)


def test_tokens_log_probabilities_times_and_values_end_at_the_same_place() -> None:
    batch, blocks, seq = _running(4, stop=50)
    batch.decode([seq], 4)
    scores = [[{token: -1.0} for token in (1, 50, 3, 4)]]
    told = tuple({"hash": token} for token in (1, 50, 3, 4))
    result = StepResult(1, [[1, 50, 3, 4]], 2.5, scores, reports={0: RowReport(values=told)})
    assert batch.commit(_built(batch), result) == [seq]
    assert (seq.output_token_ids, seq.finish_reason) == ([7, 1, 50], "stop")
    assert seq.logprobs == [{1: -1.0}, {50: -1.0}]
    assert seq.values == [{"hash": 1}, {"hash": 50}]
    assert seq.token_times == [0.0, 2.5, 2.5]
    assert blocks.num_free_blocks == 8


def test_output_that_is_not_kept_takes_all_along_that_belongs_to_it() -> None:
    _, _, seq = _running()
    seq.token_ids += [8, 9]
    seq.token_times += [1.0, 2.0]
    seq.logprobs += [{7: -1.0}, {8: -1.0}, {9: -1.0}]
    seq.values += [{"a": 7}, {"a": 8}, {"a": 9}]
    seq.keep_output(2)
    assert (seq.output_token_ids, seq.token_times) == ([7, 8], [0.0, 1.0])
    assert (seq.logprobs, seq.values) == ([{7: -1.0}, {8: -1.0}], [{"a": 7}, {"a": 8}])


def test_an_error_of_a_row_ends_its_request_and_publishes_nothing() -> None:
    batch, blocks = _batch()
    broken, other = _seq(16), _seq(16, request_id=1)
    error = ValueError("no finite logit")
    for seq in (broken, other):
        batch.admit(seq)
        batch.prefill(seq, 16)
    result = StepResult(0, [[1], [2]], 0.0, reports={0: RowReport(error=error)})
    assert batch.commit(_built(batch), result) == [broken]
    assert (broken.finish_reason, broken.error, broken.output_token_ids) == ("error", error, [])
    assert blocks.published == [(1, 17, 16)]
    assert list(batch.decoding) == [1]


def test_a_request_without_output_ends_with_its_prompt() -> None:
    batch, _ = _batch()
    seq = _seq(20, max_total=20)
    batch.check_fits(seq)
    batch.admit(seq)
    batch.prefill(seq, 12)
    assert batch.commit(_built(batch), StepResult(0, [], 0.0)) == []
    batch.prefill(seq, 12)
    plan = _built(batch)
    assert plan.prefill == (PrefillChunk(0, 12, 8, samples=False),)
    assert (plan.sampled_slots, batch.decoding) == ([], {})
    told = RowReport(values=({"state": 1},))
    assert batch.commit(plan, StepResult(1, [], 0.0, reports={0: told})) == [seq]
    assert (seq.finish_reason, seq.output_token_ids) == ("length", [])
    assert seq.values == [{"state": 1}]


def test_a_new_request_tells_its_limit_and_where_its_seed_comes_from() -> None:
    batch, _ = _batch()
    seq = Sequence(0, [1], PARAMS, max_total_tokens=9, seed=4, seed_kind=SeedKind.GIVEN, sample=2)
    batch.admit(seq)
    batch.prefill(seq, 1)
    (new,) = _built(batch).new_requests
    assert (new.max_total_tokens, new.seed, new.seed_kind, new.sample) == (9, 4, 1, 2)


def test_log_probabilities_are_taken_in_where_no_row_has_a_report() -> None:
    batch, _, seq = _running()
    batch.decode([seq])
    batch.commit(_built(batch), StepResult(1, [[8]], 0.0, [[{8: -1.0}]]))
    assert seq.logprobs == [{8: -1.0}]


def test_a_preempted_request_keeps_its_first_admission() -> None:
    moments = iter([1.0, 2.0])
    blocks = PublishingBlocks(8)
    batch = RunningBatch(blocks, 2, lambda: next(moments))
    seq = _seq(20)
    batch.admit(seq)
    batch.preempt(seq)
    blocks.cached = 16
    batch.admit(seq)
    assert (seq.admitted_at, seq.num_cached, seq.num_committed) == (1.0, 0, 16)


def test_a_request_with_processors_has_one_row_in_flight() -> None:
    batch, _ = _batch()
    seq = _seq(20)
    seq.sampling = replace(PARAMS, logits_processors=[lambda ids, logits: logits])
    assert batch.admit(seq)
    for token in range(3):
        if token:
            assert list(batch.decoding) == [0]
            assert batch.reserve(seq)
            batch.decode([seq])
        else:
            batch.prefill(seq, 20)
        plan = _built(batch)
        assert list(batch.decoding) == []
        batch.commit(plan, StepResult(plan.step_id, [[5]], 0.0))
    assert seq.output_token_ids == [5, 5, 5]
