"""Each request has logits processors of its own, here and in the processes of ranks."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from typing import Any

import pytest

from engine.processors import OwnProcessor, own_processors
from engine.ranks.channel import PlanCodec
from engine.types import NewRequest, StepPlan
from sampling_params import SamplingParams
from utils.errors import RequestError


class _Listing:
    """A processor whose state is an object of its own."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, token_ids: list[int], logits: Any) -> Any:
        self.seen.append(token_ids)
        return self.seen


class _Maker:
    def for_request(self, prompt_token_ids: list[int], sample: int) -> Any:
        prompt_token_ids.append(9)
        given = (tuple(prompt_token_ids), sample)
        return lambda ids, logits: given


def _own(given: Any, prompt: list[int], sample: int = 0, *, sent: bool = False) -> Any:
    params = SamplingParams(logits_processors=[given])
    (own,) = own_processors(params, prompt, sample, nullcontext, sent=sent).logits_processors
    return own


def test_requests_share_no_state_with_each_other_or_with_the_user() -> None:
    given = _Listing()
    first, second = _own(given, [1]), _own(given, [1])
    assert first([1], None) == [[1]]
    assert second([1], None) == [[1]]
    assert first([1, 2], None) == [[1], [1, 2]]
    assert given.seen == []


def test_a_maker_gets_a_prompt_of_its_own() -> None:
    prompt = [5, 6]
    assert _own(_Maker(), prompt, 3)(None, None) == ((5, 6, 9), 3)
    assert prompt == [5, 6]


def test_what_was_made_must_be_callable() -> None:
    class Wrong:
        def for_request(self, prompt_token_ids: list[int], sample: int) -> int:
            return 5

    with pytest.raises(RequestError, match="not callable"):
        _own(Wrong(), [1])


def test_a_released_processor_is_forgotten_and_not_called() -> None:
    own = _own(_Listing(), [1])
    own.release()
    assert own([1], "logits") == "logits"
    assert own.call is None


def test_what_cannot_be_sent_is_refused_only_if_it_is_sent() -> None:
    _own(_Maker(), [1])
    with pytest.raises(RequestError, match="ranks cannot be sent"):
        _own(_Maker(), [1], sent=True)


class _Once:
    """Can be sent once: afterwards it has changed."""

    def __init__(self) -> None:
        self.left = 1

    def __reduce__(self) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError("second time")
        return _Listing, ()

    def __call__(self, token_ids: list[int], logits: Any) -> Any:
        return logits


def test_what_was_checked_is_what_is_sent() -> None:
    class Maker:
        def for_request(self, prompt_token_ids: list[int], sample: int) -> Any:
            return _Once()

    own = _own(Maker(), [1], sent=True)
    assert pickle.loads(pickle.dumps(own))([4], None) == [[4]]


class TestSent:
    """Plans that a runner's `PlanCodec` encodes and that a rank's decodes."""

    def setup_method(self) -> None:
        self.sender, self.receiver = PlanCodec(), PlanCodec()
        self.own = OwnProcessor(_Listing())
        self.plain = SamplingParams()

    def _pass(self, *requests: tuple[int, SamplingParams]) -> tuple[NewRequest, ...]:
        new = tuple(NewRequest(slot, i, (1,), p, 0) for slot, (i, p) in enumerate(requests))
        plan = StepPlan(0, new)
        return self.receiver.decode(pickle.loads(self.sender.encode(plan))).new_requests

    def test_the_state_stays_over_a_preemption(self) -> None:
        params = SamplingParams(logits_processors=[self.own], seed=7)
        (first,) = self._pass((3, params))
        (sent,) = first.sampling.logits_processors
        assert sent([1], None) == [[1]]
        other, again = self._pass((4, self.plain), (3, params))
        assert other.sampling == self.plain
        assert again.sampling.seed == 7
        (kept,) = again.sampling.logits_processors
        assert kept([2], None) == [[1], [2]]
        assert isinstance(self.own.call, _Listing)
        assert self.own.call.seen == []

    def test_the_first_plan_after_the_end_releases_it(self) -> None:
        params = SamplingParams(logits_processors=[self.own])
        (first,) = self._pass((3, params))
        sent: Any = first.sampling.logits_processors[0]
        self._pass()
        assert sent.call is not None
        self.own.release()
        self._pass((5, self.plain))
        assert sent.call is None
        # The number of a request of another engine state may come again.
        (again,) = self._pass((3, SamplingParams(logits_processors=[OwnProcessor(_Listing())])))
        assert again.sampling.logits_processors[0]([8], None) == [[8]]

    def test_a_processor_of_a_user_is_sent_each_time(self) -> None:
        params = SamplingParams(logits_processors=[_Listing()])
        for _ in range(2):
            (new,) = self._pass((3, params))
            assert new.sampling.logits_processors[0]([1], None) == [[1]]
