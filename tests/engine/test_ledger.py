"""Slots, blocks and plans as a scheduler author meets them; no torch."""

from __future__ import annotations

import pytest

from config import Config
from engine.ledger import Ledger
from engine.sequence import Sequence
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


def _ledger(
    num_blocks: int = 8, slots: int = 2, cached: int = 0
) -> tuple[Ledger, PublishingBlocks]:
    blocks = PublishingBlocks(num_blocks, cached)
    return Ledger(blocks, slots, lambda: 0.0), blocks


def _seq(num_prompt: int, request_id: int = 0, max_total: int = 100, stop: int = -1) -> Sequence:
    return Sequence(
        request_id,
        list(range(num_prompt)),
        PARAMS,
        max_total_tokens=max_total,
        stop_token_ids=frozenset({stop}),
        seed=9,
    )


def _built(ledger: Ledger) -> StepPlan:
    plan = ledger.build()
    assert plan is not None
    return plan


def test_the_plan_of_an_admission_carries_prompt_blocks_and_chunk() -> None:
    ledger, _ = _ledger()
    seq = _seq(20)
    assert ledger.admit(seq)
    ledger.prefill(seq, 20)
    assert _built(ledger) == StepPlan(
        0,
        (NewRequest(0, 0, tuple(range(20)), PARAMS, 9, max_total_tokens=100),),
        (BlockUpdate(0, 0, (0, 1)),),
        (PrefillChunk(0, 0, 20, True),),
        (),
    )


def test_nothing_to_compute_builds_no_plan() -> None:
    ledger, _ = _ledger()
    assert ledger.build() is None
    assert ledger.num_in_flight == 0


def test_an_admission_without_rows_waits_for_the_next_plan() -> None:
    ledger, _ = _ledger()
    seq = _seq(5)
    ledger.admit(seq)
    assert ledger.build() is None
    ledger.prefill(seq, 5)
    assert len(_built(ledger).new_requests) == 1


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (33, 3)])
def test_blocks_for(num_tokens: int, blocks: int) -> None:
    assert _ledger()[0].blocks_for(num_tokens) == blocks


def test_admission_without_a_free_slot_changes_nothing() -> None:
    ledger, blocks = _ledger(slots=1)
    ledger.admit(_seq(5))
    free = blocks.num_free_blocks
    other = _seq(5, request_id=1)
    assert not ledger.admit(other)
    assert (blocks.num_free_blocks, other.slot, ledger.num_running) == (free, None, 1)


def test_admission_without_enough_blocks_changes_nothing() -> None:
    ledger, blocks = _ledger(num_blocks=2)
    seq = _seq(33)
    assert not ledger.admit(seq)
    assert (blocks.num_free_blocks, seq.slot, ledger.num_running) == (2, None, 0)
    assert ledger.admit(_seq(32))


def test_cached_tokens_are_neither_computed_nor_published_again() -> None:
    ledger, blocks = _ledger(cached=32)
    seq = _seq(40)
    ledger.admit(seq)
    assert (seq.num_scheduled, seq.num_committed) == (32, 32)
    ledger.prefill(seq, 8)
    plan = _built(ledger)
    assert plan.prefill == (PrefillChunk(0, 32, 8, True),)
    assert plan.block_updates == (BlockUpdate(0, 0, (0, 1, 2)),)
    ledger.commit(plan, StepResult(0, [[5]], 0.0))
    assert blocks.published == []


def test_reserve_takes_a_block_only_at_a_border() -> None:
    ledger, blocks = _ledger()
    seq = _seq(15)
    ledger.admit(seq)
    ledger.prefill(seq, 15)
    assert ledger.reserve(seq)
    assert blocks.num_free_blocks == 7
    ledger.decode([seq])
    ledger.build()
    assert ledger.reserve(seq)
    assert blocks.num_free_blocks == 6
    ledger.decode([seq])
    assert _built(ledger).block_updates == (BlockUpdate(0, 1, (1,)),)


def test_reserve_without_blocks_changes_nothing() -> None:
    ledger, _ = _ledger(num_blocks=1)
    seq = _seq(16)
    ledger.admit(seq)
    ledger.prefill(seq, 16)
    assert not ledger.reserve(seq)
    assert (seq.capacity, seq.num_scheduled) == (16, 16)


def test_a_reservation_is_sent_with_the_next_plan_even_if_planning_was_given_up() -> None:
    ledger, _ = _ledger()
    seq = _seq(16)
    ledger.admit(seq)
    ledger.prefill(seq, 16)
    ledger.build()
    assert ledger.reserve(seq)
    assert ledger.build() is None
    ledger.decode([seq])
    assert _built(ledger).block_updates == (BlockUpdate(0, 1, (1,)),)


def test_full_blocks_are_published_once_they_are_committed() -> None:
    ledger, blocks = _ledger()
    seq = _seq(30)
    ledger.admit(seq)
    ledger.prefill(seq, 10)
    first = _built(ledger)
    ledger.prefill(seq, 20)
    second = _built(ledger)
    assert blocks.published == []
    ledger.commit(first, StepResult(0, [], 0.0))
    assert blocks.published == []
    ledger.commit(second, StepResult(1, [[7]], 0.0))
    assert blocks.published == [(0, 31, 30)]
    for step in range(2, 4):
        ledger.decode([seq])
        ledger.commit(_built(ledger), StepResult(step, [[7]], 0.0))
    assert blocks.published == [(0, 31, 30), (0, 33, 32)]


def test_several_tokens_of_one_step_stop_at_the_first_end() -> None:
    ledger, _, seq = _running(4, stop=50)
    ledger.decode([seq], 3)
    assert ledger.commit(_built(ledger), StepResult(1, [[8, 50, 9]], 0.0)) == [seq]
    assert (seq.output_token_ids, seq.finish_reason) == ([7, 8, 50], "stop")


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (StepResult(2, [[1]], 0.0), "its result is of step 2"),
        (StepResult(1, [], 0.0), "1 rows that sample; .* tokens of 0"),
        (StepResult(1, [[1], [2]], 0.0), "1 rows that sample; .* tokens of 2"),
        (StepResult(1, [[]], 0.0), "row 0: 0 tokens of 3 positions"),
        (StepResult(1, [[1, 2, 3, 4]], 0.0), "row 0: 4 tokens of 3 positions"),
        (StepResult(1, [[1, 2]], 0.0, []), "log-probabilities of 0"),
        (StepResult(1, [[1, 2]], 0.0, [[{1: 0.0}]]), "2 tokens .* 1 log-probabilities"),
    ],
)
def test_a_result_that_is_not_the_plan_s_is_refused(result: StepResult, problem: str) -> None:
    ledger, _, seq = _running()
    ledger.decode([seq], 3)
    with pytest.raises(ContractError, match=problem):
        ledger.commit(_built(ledger), result)


def test_two_tokens_where_one_was_planned() -> None:
    ledger, _, seq = _running()
    ledger.decode([seq])
    with pytest.raises(ContractError, match="2 tokens of 1 positions"):
        ledger.commit(_built(ledger), StepResult(1, [[1, 2]], 0.0))


def test_a_finished_request_keeps_slot_and_blocks_while_in_flight() -> None:
    ledger, blocks = _ledger()
    seq = _seq(4)
    ledger.admit(seq)
    ledger.prefill(seq, 4)
    plan = _built(ledger)
    ledger.finish(seq, "abort")
    assert (seq.slot, ledger.num_running, blocks.num_free_blocks) == (0, 1, 7)
    assert ledger.commit(plan, StepResult(0, [[1]], 0.0)) == []
    assert (seq.slot, ledger.num_running, blocks.num_free_blocks) == (None, 0, 8)


def test_a_request_in_flight_cannot_be_preempted() -> None:
    ledger, _ = _ledger()
    seq = _seq(4)
    ledger.admit(seq)
    ledger.prefill(seq, 4)
    with pytest.raises(AssertionError, match="in flight"):
        ledger.preempt(seq)


def test_preemption_forgets_what_was_computed_and_keeps_the_output() -> None:
    ledger, blocks = _ledger()
    seq = _seq(4)
    ledger.admit(seq)
    ledger.prefill(seq, 4)
    ledger.commit(_built(ledger), StepResult(0, [[42]], 0.0))
    ledger.preempt(seq)
    assert (seq.slot, seq.num_scheduled, seq.num_committed, seq.capacity) == (None, 0, 0, 0)
    assert (seq.num_preemptions, seq.token_ids) == (1, [0, 1, 2, 3, 42])
    assert blocks.num_free_blocks == 8
    assert ledger.admit(seq)
    assert seq.num_prefill == 5


def test_a_request_admitted_and_ended_before_the_plan_leaves_no_trace_in_it() -> None:
    ledger, _ = _ledger()
    gone, stays = _seq(20), _seq(5, request_id=1)
    ledger.admit(gone)
    ledger.finish(gone, "abort")
    ledger.admit(stays)
    ledger.prefill(stays, 5)
    plan = _built(ledger)
    assert [new.request_id for new in plan.new_requests] == [1]
    assert len(plan.block_updates) == 1


def _running(num_prompt: int = 4, **options: int) -> tuple[Ledger, PublishingBlocks, Sequence]:
    """A request whose prompt has been computed and committed, with one token of output."""
    ledger, blocks = _ledger()
    seq = _seq(num_prompt, **options)
    ledger.admit(seq)
    ledger.prefill(seq, num_prompt)
    ledger.commit(_built(ledger), StepResult(0, [[7]], 0.0))
    return ledger, blocks, seq


def test_what_is_committed_rises_by_what_was_kept() -> None:
    ledger, blocks, seq = _running(14)
    ledger.decode([seq], 4)
    plan = _built(ledger)
    assert (plan.decode_tokens, plan.num_tokens, seq.num_scheduled) == ((4,), 4, 18)
    ledger.commit(plan, StepResult(1, [[8]], 0.0))
    assert (seq.num_committed, seq.num_scheduled, seq.num_drafted) == (15, 15, 0)
    assert blocks.published == []
    ledger.decode([seq], 4)
    ledger.commit(_built(ledger), StepResult(2, [[1, 2, 3]], 0.0))
    assert (seq.num_committed, seq.token_ids[14:]) == (18, [7, 8, 1, 2, 3])
    assert blocks.published == [(0, 19, 18)]


def test_plans_of_one_position_a_row_are_as_they_were() -> None:
    ledger, _, seq = _running()
    ledger.decode([seq])
    plan = _built(ledger)
    assert (plan.decode_tokens, plan.decode_counts, plan.num_tokens) == ((), (1,), 1)


def test_blocks_are_reserved_for_the_latest_start_in_flight() -> None:
    ledger, _, seq = _running(12)
    ledger.decode([seq], 3)
    assert _built(ledger).block_updates == ()
    # 12 to 15 positions are computed then: up to 18 with three more.
    ledger.decode([seq], 3)
    assert _built(ledger).block_updates == (BlockUpdate(0, 1, (1,)),)
    assert (seq.num_scheduled, seq.num_drafted) == (18, 4)


def test_drafts_take_nobody_s_blocks() -> None:
    ledger, _ = _ledger(num_blocks=1)
    seq = _seq(12)
    ledger.admit(seq)
    ledger.prefill(seq, 12)
    ledger.commit(_built(ledger), StepResult(0, [[7]], 0.0))
    ledger.decode([seq], 9)
    plan = _built(ledger)
    assert (plan.decode_tokens, plan.block_updates) == ((4,), ())


def test_a_request_that_may_have_reached_its_limit_waits_and_goes_on() -> None:
    ledger, _, seq = _running(4, max_total=8)
    ledger.decode([seq], 3)
    plan = _built(ledger)
    assert plan.decode_tokens == (3,)
    assert seq.request_id not in ledger.decoding
    ledger.commit(plan, StepResult(1, [[1]], 0.0))
    assert list(ledger.decoding) == [seq.request_id]
    ledger.decode([seq], 3)
    plan = _built(ledger)
    # Position 7 would be that of the last token, which is never computed.
    assert plan.decode_tokens == (2,)
    assert ledger.commit(plan, StepResult(2, [[2, 3]], 0.0)) == [seq]
    assert (seq.output_token_ids, seq.finish_reason) == ([7, 1, 2, 3], "length")


def test_a_row_may_reach_the_limit_from_its_earliest_start() -> None:
    """The runner cuts it if it starts later, so no step is lost if it does not."""
    ledger, _, seq = _running(4, max_total=12)
    ledger.decode([seq], 4)
    _built(ledger)
    # 5 to 8 positions are computed then, of 11.
    ledger.decode([seq], 9)
    plan = _built(ledger)
    assert plan.decode_tokens == (6,)
    assert (seq.num_scheduled, seq.capacity) == (14, 16)


def test_tokens_log_probabilities_times_and_values_end_at_the_same_place() -> None:
    ledger, blocks, seq = _running(4, stop=50)
    ledger.decode([seq], 4)
    scores = [[{token: -1.0} for token in (1, 50, 3, 4)]]
    told = tuple({"hash": token} for token in (1, 50, 3, 4))
    result = StepResult(1, [[1, 50, 3, 4]], 2.5, scores, reports={0: RowReport(values=told)})
    assert ledger.commit(_built(ledger), result) == [seq]
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
    ledger, blocks = _ledger()
    broken, other = _seq(16), _seq(16, request_id=1)
    error = ValueError("no finite logit")
    for seq in (broken, other):
        ledger.admit(seq)
        ledger.prefill(seq, 16)
    result = StepResult(0, [[1], [2]], 0.0, reports={0: RowReport(error=error)})
    assert ledger.commit(_built(ledger), result) == [broken]
    assert (broken.finish_reason, broken.error, broken.output_token_ids) == ("error", error, [])
    assert blocks.published == [(1, 17, 16)]
    assert list(ledger.decoding) == [1]


def test_a_request_without_output_ends_with_its_prompt() -> None:
    ledger, _ = _ledger()
    seq = _seq(20, max_total=20)
    ledger.check_fits(seq)
    ledger.admit(seq)
    ledger.prefill(seq, 12)
    assert ledger.commit(_built(ledger), StepResult(0, [], 0.0)) == []
    ledger.prefill(seq, 12)
    plan = _built(ledger)
    assert plan.prefill == (PrefillChunk(0, 12, 8, samples=False),)
    assert (plan.sampled_slots, ledger.decoding) == ([], {})
    told = RowReport(values=({"state": 1},))
    assert ledger.commit(plan, StepResult(1, [], 0.0, reports={0: told})) == [seq]
    assert (seq.finish_reason, seq.output_token_ids) == ("length", [])
    assert seq.values == [{"state": 1}]


def test_a_new_request_tells_its_limit_and_where_its_seed_comes_from() -> None:
    ledger, _ = _ledger()
    seq = Sequence(0, [1], PARAMS, max_total_tokens=9, seed=4, seed_kind=SeedKind.GIVEN, sample=2)
    ledger.admit(seq)
    ledger.prefill(seq, 1)
    (new,) = _built(ledger).new_requests
    assert (new.max_total_tokens, new.seed, new.seed_kind, new.sample) == (9, 4, 1, 2)


def test_log_probabilities_are_taken_in_where_no_row_has_a_report() -> None:
    ledger, _, seq = _running()
    ledger.decode([seq])
    ledger.commit(_built(ledger), StepResult(1, [[8]], 0.0, [[{8: -1.0}]]))
    assert seq.logprobs == [{8: -1.0}]


def test_a_preempted_request_keeps_its_first_admission() -> None:
    moments = iter([1.0, 2.0])
    blocks = PublishingBlocks(8)
    ledger = Ledger(blocks, 2, lambda: next(moments))
    seq = _seq(20)
    ledger.admit(seq)
    ledger.preempt(seq)
    blocks.cached = 16
    ledger.admit(seq)
    assert (seq.admitted_at, seq.num_cached, seq.num_committed) == (1.0, 0, 16)
