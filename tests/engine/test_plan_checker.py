"""The rules of plans and results, each broken once; right plans pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from config import Config
from engine.checking.plan_checker import CheckedHandle, PlanChecker
from engine.types import (
    BlockCopy,
    BlockUpdate,
    KVGeometry,
    NewRequest,
    PrefillChunk,
    RowReport,
    StepHandle,
    StepPlan,
    StepResult,
    TokenLogprobs,
    WindowPages,
)
from sampling_params import SamplingParams
from utils.errors import ContractError, PlanError, StepError

GREEDY = SamplingParams(temperature=0)
FULL = KVGeometry(1, 1, 1, block_size=4, num_blocks=6, dtype_bytes=4)
WINDOW = replace(FULL, kind=WindowPages(4))


def _checker(*groups: KVGeometry) -> PlanChecker:
    config = Config(model="none", max_num_seqs=3, max_num_batched_tokens=16)
    return PlanChecker(groups or (FULL,), config)


def _new(slot: int = 1, count: int = 6, limit: int = 20, request_id: int = 0) -> NewRequest:
    return NewRequest(slot, request_id, tuple(range(count)), GREEDY, 5, max_total_tokens=limit)


def _first(limit: int = 20, blocks: tuple[int, ...] = (3, 0, 2)) -> StepPlan:
    """A prompt of six positions."""
    return StepPlan(
        0, (_new(limit=limit),), (BlockUpdate(1, 0, blocks),), (PrefillChunk(1, 0, 6, True),)
    )


def _decode(step_id: int, *counts: int) -> StepPlan:
    return StepPlan(step_id, decode=(1,), decode_tokens=counts)


def _result(step_id: int, *tokens: int) -> StepResult:
    return StepResult(step_id, [[*tokens]], 0.0)


def test_a_request_with_drafts_from_its_prompt_to_its_limit() -> None:
    checker = _checker()
    checker.check(_first(limit=11))
    checker.take(_result(0, 1))
    (row,) = checker.check(_decode(1, 3))
    assert (row.start, row.latest, row.end) == (6, 6, 9)
    checker.take(_result(1, 1, 2))
    (row,) = checker.check(_decode(2, 2))
    # Position 10 would be that of the last token, which is never computed.
    assert (row.start, row.latest, row.end) == (8, 8, 10)
    checker.take(_result(2, 1, 2))
    with pytest.raises(ContractError, match="may have reached its limit of 11 tokens"):
        checker.check(_decode(3, 1))


def test_a_start_is_a_range_until_the_step_before_has_come_back() -> None:
    checker = _checker()
    checker.check(_first())
    checker.check(_decode(1, 3))
    (row,) = checker.check(_decode(2, 2))
    assert (row.start, row.latest, row.end) == (7, 9, 11)
    checker.take(_result(0, 1))
    checker.take(_result(1, 1, 2))
    assert (row.start, row.latest, row.end) == (8, 8, 10)
    with pytest.raises(ContractError, match="position 12 has no block"):
        checker.check(_decode(3, 4))


def test_results_may_be_taken_in_any_order() -> None:
    checker = _checker()
    checker.check(_first())
    checker.check(_decode(1, 3))
    checker.take(_result(1, 1, 2, 3))
    other = replace(_first(), new_requests=(_new(request_id=1),))
    with pytest.raises(ContractError, match="slot 1 changes hands while a step uses it"):
        checker.check(replace(other, step_id=2))
    checker.take(_result(0, 1))
    checker.check(replace(other, step_id=3))


@pytest.mark.parametrize(
    ("plan", "rule"),
    [
        (_decode(1, 1, 1), "decode_tokens has 2 entries for 1 rows"),
        (_decode(1, 0), "decode rows of"),
        (_decode(1, -1), "decode rows of"),
        (_decode(1, 17), "17 tokens exceed the token budget"),
        (_decode(1, 7), "position 12 has no block in slot 1"),
        (replace(_decode(1), block_updates=(BlockUpdate(1, 3, (4,), 1),)), "no group 1"),
        (replace(_decode(1), block_copies=(BlockCopy(0, 4, 1),)), "no group 1"),
        (replace(_decode(1), block_updates=(BlockUpdate(1, -1, (4,)),)), "a gap"),
        (replace(_decode(1), block_copies=(BlockCopy(0, 4), BlockCopy(2, 4))), "that overlap"),
        (
            StepPlan(
                1,
                (_new(2, 6, 20, 1),),
                (BlockUpdate(2, 0, (4, 5)),),
                (PrefillChunk(2, -1, 7, True),),
            ),
            "a negative start",
        ),
        (replace(_decode(1), new_requests=(_new(1),)), "slot 1 changes hands"),
        (replace(_decode(1), new_requests=(_new(2),)), "enters slot 2 while it is in flight"),
        (
            StepPlan(1, (_new(2, 6, 6, 1),), (), (PrefillChunk(2, 0, 6, True),)),
            "samples=True is wrong",
        ),
        (
            StepPlan(1, (_new(2, 6, 5, 1),), (), (PrefillChunk(2, 0, 6, True),)),
            "6 tokens of at least 1, at most 5",
        ),
    ],
)
def test_plans_that_break_a_rule(plan: StepPlan, rule: str) -> None:
    checker = _checker()
    checker.check(_first())
    with pytest.raises(ContractError, match=rule):
        checker.check(plan)


@pytest.mark.parametrize(
    ("result", "rule"),
    [
        (StepResult(1, [], 0.0), r"\(1, 0, 1, \d\) instead of \(1, 1, 1"),
        (StepResult(1, [[]], 0.0), "0 tokens of 3 positions"),
        (StepResult(1, [[1, 2, 3, 4]], 0.0), "4 tokens of 3 positions"),
        (StepResult(1, [[1, 2]], 0.0, [[{1: 0.0}]]), "most, 1 log-probabilities"),
        (StepResult(1, [[1, 2]], 0.0, reports={0: RowReport(values=({},))}), "and 1 values"),
        (StepResult(1, [[1]], 0.0, reports={1: RowReport()}), "a row that is not there"),
    ],
)
def test_results_that_break_a_rule(result: StepResult, rule: str) -> None:
    checker = _checker()
    checker.check(_first())
    checker.take(_result(0, 1))
    checker.check(_decode(1, 3))
    with pytest.raises(ContractError, match=rule):
        checker.take(result)


def test_more_tokens_than_the_limit_allows() -> None:
    checker = _checker()
    checker.check(_first(limit=10))
    checker.check(_decode(1, 2))
    # From 7 or 8 positions on, of 9: the second of two may be beyond them.
    checker.check(_decode(2, 2))
    checker.take(_result(0, 1))
    checker.take(_result(1, 1, 2))
    with pytest.raises(ContractError, match="more than its limit of 10 tokens"):
        checker.take(_result(2, 1, 2))


def test_a_request_that_may_have_reached_its_limit_is_not_planned() -> None:
    """Until the step before has come back and told that it has not."""
    checker = _checker()
    checker.check(_first(limit=9))
    checker.check(_decode(1, 2))
    with pytest.raises(ContractError, match="slot 1 may have reached its limit of 9 tokens"):
        checker.check(_decode(2))


def test_a_chunk_starts_where_the_one_before_ended() -> None:
    checker = _checker()
    checker.check(replace(_first(), prefill=(PrefillChunk(1, 0, 4, False),)))
    with pytest.raises(ContractError, match="positions 2 to 6: 4 are computed"):
        checker.check(StepPlan(1, prefill=(PrefillChunk(1, 2, 4, True),)))


class _Inner(StepHandle):
    def __init__(self, outcome: StepResult | Exception) -> None:
        self._outcome = outcome

    def result(self) -> StepResult:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def test_a_result_may_be_asked_for_twice() -> None:
    checker = _checker()
    checker.check(_first())
    handle = CheckedHandle(_Inner(_result(0, 1)), checker)
    assert handle.result() == handle.result() == _result(0, 1)


def test_after_a_step_that_failed_only_step_0_may_follow() -> None:
    checker = _checker()
    checker.check(_first())
    with pytest.raises(StepError):
        CheckedHandle(_Inner(StepError("planted")), checker).result()
    with pytest.raises(ContractError, match="step 1 is out of order"):
        checker.check(_decode(1))
    assert checker.check(_first())


def test_of_a_row_with_an_error_no_log_probabilities_are_asked() -> None:
    checker = _checker()
    wants = replace(_new(), sampling=SamplingParams(logprobs=1))
    checker.check(replace(_first(), new_requests=(wants,)))
    checker.take(StepResult(0, [[1]], 0.0, reports={0: RowReport(error=ValueError())}))


def test_who_has_ended_is_not_planned() -> None:
    checker = _checker()
    checker.check(_first())
    checker.end(0)
    with pytest.raises(ContractError, match="its request has ended"):
        checker.check(_decode(1))
    again = StepPlan(2, (_new(2),), (BlockUpdate(2, 0, (4, 5)),), (PrefillChunk(2, 0, 6, True),))
    with pytest.raises(ContractError, match="request 0 has ended"):
        checker.check(again)


def test_an_error_of_a_row_ends_its_request() -> None:
    checker = _checker()
    checker.check(_first())
    checker.take(StepResult(0, [[]], 0.0, reports={0: RowReport(error=ValueError())}))
    with pytest.raises(ContractError, match="its request has ended"):
        checker.check(_decode(1))


def test_a_preempted_request_leaves_its_old_slot() -> None:
    checker = _checker()
    checker.check(_first())
    checker.take(_result(0, 1))
    moved = StepPlan(
        1, (_new(2),), (BlockUpdate(2, 0, (3, 0)),), (PrefillChunk(2, 0, 6, True),), (1,)
    )
    with pytest.raises(ContractError, match="slot 1 is planned, and its request has ended"):
        checker.check(moved)


def test_everything_starts_anew_with_step_0() -> None:
    """Even with a step in flight whose result nobody can take: its handle was never returned."""
    checker = _checker()
    checker.check(_first())
    with pytest.raises(ContractError, match="step 2 is out of order"):
        checker.check(_decode(2))
    checker.check(_first())
    checker.take(_result(0, 1))
    checker.check(_decode(1))


def test_a_result_of_a_step_that_is_not_in_flight() -> None:
    checker = _checker()
    checker.check(_first())
    with pytest.raises(ContractError, match="a result of step 1, not in flight"):
        checker.take(_result(1, 1))


def test_log_probabilities_are_given_to_those_who_asked() -> None:
    asks = replace(_new(), sampling=SamplingParams(logprobs=0))
    cases: list[tuple[NewRequest, list[list[TokenLogprobs]] | None]] = [
        (asks, None),
        (asks, [[]]),
        (_new(), [[{1: 0.0}]]),
    ]
    for new, scores in cases:
        checker = _checker()
        checker.check(replace(_first(), new_requests=(new,)))
        with pytest.raises(ContractError, match=r"log-probabilities, and . were asked for"):
            checker.take(StepResult(0, [[1]], 0.0, scores))


def _thief(step_id: int, block: int) -> StepPlan:
    """Another request, which gets a block of the second group and one of its own of the first."""
    updates = (BlockUpdate(0, 0, (5,)), BlockUpdate(0, 0, (block,), 1))
    return StepPlan(step_id, (_new(0, 1, 20, 1),), updates, (PrefillChunk(0, 0, 1, True),))


def _windowed() -> PlanChecker:
    """A request at position 9 in flight, with blocks 3, 0 and 2 of both groups."""
    checker = _checker(FULL, WINDOW)
    first = _first()
    checker.check(
        replace(first, block_updates=(*first.block_updates, BlockUpdate(1, 0, (3, 0, 2), 1)))
    )
    checker.take(_result(0, 1))
    for step_id in (1, 2, 3):
        checker.check(_decode(step_id))
        checker.take(_result(step_id, 1))
    checker.check(_decode(4))
    return checker


def test_a_block_that_left_the_window_may_go_to_another() -> None:
    """Position 9 reads positions 6 to 9, so block 3 of the second group is free."""
    assert _windowed().check(_thief(5, 3))


@pytest.mark.parametrize("block", [0, 2])
def test_a_block_in_the_window_may_not(block: int) -> None:
    with pytest.raises(PlanError, match=r"goes to slot 0 while slots \[1\] use it") as error:
        _windowed().check(_thief(5, block))
    assert (error.value.step_id, error.value.request_id, error.value.block) == (5, 1, block)
    # No sanitizer took part.
    assert type(error.value) is PlanError


def test_blocks_of_two_groups_are_not_the_same_for_their_number() -> None:
    copies = (BlockCopy(4, 5), BlockCopy(5, 4, 1))
    assert _windowed().check(replace(_thief(5, 3), block_copies=copies))
    with pytest.raises(ContractError, match="copies that overlap"):
        _windowed().check(replace(_thief(5, 3), block_copies=(*copies, BlockCopy(3, 4, 1))))


def test_a_group_without_a_block_for_the_position() -> None:
    checker = _checker(FULL, WINDOW)
    first = _first()
    short = BlockUpdate(1, 0, (3,), 1)
    with pytest.raises(PlanError, match="position 4 has no block"):
        checker.check(replace(first, block_updates=(*first.block_updates, short)))


def test_step_0_empties_the_slots() -> None:
    checker = _checker()
    checker.check(_first())
    checker.take(_result(0, 1))
    with pytest.raises(ContractError, match="no request ever entered slot 1"):
        checker.check(_decode(0))


def test_an_update_leaves_the_entries_behind_it() -> None:
    checker = _checker()
    checker.check(_first())
    plan = replace(_decode(1), block_updates=(BlockUpdate(1, 1, (4,)),))
    (row,) = checker.check(plan)
    assert row.state.tables == [[3, 4, 2]]


def test_results_from_before_a_failure_are_forgotten() -> None:
    """One that was taken early is not that of the step which has its number then."""
    checker = _checker()
    for _ in range(2):
        checker.check(_first())
        checker.check(_decode(1, 3))
        checker.take(_result(1, 1))
        checker.reset()
        # Of a step that was in flight then.
        checker.take(_result(0, 1))
    checker.check(_first())
    checker.check(_decode(1, 3))
    checker.take(_result(0, 1))
    checker.take(_result(1, 1))
    with pytest.raises(ContractError, match="a result of step 1, not in flight"):
        checker.take(_result(1, 1))
