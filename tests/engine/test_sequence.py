from __future__ import annotations

from engine.requests import Sequence
from sampling_params import SamplingParams


def _seq(prompt: list[int]) -> Sequence:
    return Sequence(3, prompt, SamplingParams(), max_total_tokens=9)


def test_the_prompt_is_copied() -> None:
    prompt = [1, 2, 3]
    seq = _seq(prompt)
    seq.token_ids.append(4)
    assert prompt == [1, 2, 3]


def test_output_is_what_follows_the_prompt() -> None:
    seq = _seq([1, 2])
    assert seq.output_token_ids == []
    seq.token_ids += [3, 4]
    assert seq.output_token_ids == [3, 4]


def _decoding() -> Sequence:
    """Preempted twice already, and in the middle of its output."""
    seq = _seq([1, 2])
    seq.token_ids.append(3)
    seq.slot, seq.num_scheduled, seq.num_committed, seq.capacity = 4, 3, 2, 16
    seq.num_prefill, seq.num_drafted, seq.num_in_flight, seq.num_preemptions = 2, 1, 1, 2
    return seq


def test_reset_forgets_the_computation_and_keeps_tokens_and_preemptions() -> None:
    seq = _decoding()
    seq.reset()
    assert seq.slot is None
    assert (seq.num_scheduled, seq.num_prefill, seq.num_committed, seq.capacity) == (0, 0, 0, 0)
    assert (seq.num_drafted, seq.num_in_flight) == (0, 0)
    assert (seq.token_ids, seq.num_preemptions) == ([1, 2, 3], 2)


def test_no_state_is_shared_between_requests() -> None:
    first, second = _seq([1]), _seq([1])
    first.token_ids.append(2)
    assert second.token_ids == [1]
    assert not hasattr(first, "__dict__")


def test_repr_names_the_request_and_its_progress() -> None:
    assert repr(_seq([1, 2])) == (
        "Sequence(request_id=3, prompt=2, tokens=2/9, slot=None, finish_reason=None)"
    )
