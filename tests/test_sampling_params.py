from __future__ import annotations

import inspect
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch

from sampling_params import SamplingParams
from utils.errors import RequestError


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 1e-9},
        {"temperature": 2},
        {"max_tokens": 1},
        {"max_tokens": None},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"seed": None},
        {"top_p": 1},
        {"top_p": 1e-300},
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": 10**12},
        {"min_p": 0},
        {"min_p": 1.0},
        {"repetition_penalty": 1e-6},
        {"presence_penalty": -2},
        {"frequency_penalty": 2.0},
        {"min_tokens": 64},
        {"stop": ()},
        {"stop_token_ids": (0,)},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"prompt_logprobs": 1024},
        {"n": 1024},
        {"logit_bias": ((1, -100), (3, 100.0))},
        {"allowed_token_ids": (3, 5)},
        {"allowed_token_ids": None},
        {"bad_words": ("a", " b ")},
        {"bad_words_ids": ((1,) * 32,) * 512},
        {"logits_processors": (len,)},
        {"priority": -(2**40)},
        {"user": "someone"},
        {"cache_salt": "tenant"},
        {"predicted_tokens": 1},
        {"predicted_tokens": None},
    ],
)
def test_values_at_the_edge_are_accepted(values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    assert getattr(SamplingParams(**values), name) == value


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("top_q", "Did you mean 'top_p'?"),
        ("max_new_tokens", "Did you mean 'max_tokens'?"),
        ("num_return_sequences", "Did you mean 'n'?"),
        ("stop_strings", "Did you mean 'stop'?"),
        ("do_sample", "Use temperature=0"),
        ("structured_outputs", "json_schema"),
        ("xyzzy", "Known: allowed_token_ids, bad_words"),
    ],
)
def test_unknown_parameters_are_refused(name: str, fix: str) -> None:
    values: dict[str, Any] = {"temperature": 0.5, name: False}
    with pytest.raises(RequestError, match="unknown parameter") as caught:
        SamplingParams(**values)
    assert (caught.value.field, caught.value.value) == (name, False)
    assert fix in caught.value.fix
    assert "penalizes" not in caught.value.fix  # the constructor sets it
    assert caught.value.__context__ is None


def test_parameters_have_names() -> None:
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(0.5)  # type: ignore[call-arg]
    assert list(inspect.signature(SamplingParams).parameters)[:2] == ["temperature", "top_p"]


NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
OTHERS = ("frequency_penalty", "min_tokens", "n", "priority", "stop", "stop_token_ids")
LEFT = ("logits_processors", "user", "cache_salt", "seed")


def test_none_is_the_default() -> None:
    values: dict[str, Any] = dict.fromkeys((*NUMBERS, *OTHERS, *LEFT))
    assert SamplingParams(**values) == SamplingParams()
    assert SamplingParams(max_tokens=None) != SamplingParams()
    for name in ("ignore_eos", "detokenize", "skip_special_tokens", "logprobs_details"):
        with pytest.raises(RequestError, match="must be a bool"):
            SamplingParams(**{name: None})  # type: ignore[arg-type]


@pytest.mark.parametrize("scalar", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_numbers_are_those_of_python(scalar: Any) -> None:
    given: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "seed": 7, "ignore_eos": True}
    given |= {"max_tokens": 9, "presence_penalty": -1.0, "logprobs": 2}
    params = SamplingParams(
        **{name: scalar(value) for name, value in given.items()},
        stop_token_ids=[scalar(5), 6],
    )
    assert params == SamplingParams(**given, stop_token_ids=[5, 6])
    for name, value in given.items():
        assert type(getattr(params, name)) is type(value), name
    assert list(map(type, params.stop_token_ids)) == [int, int]
    assert SamplingParams(stop_token_ids=scalar([5, 6])) == SamplingParams(stop_token_ids=[5, 6])
    with pytest.raises(RequestError, match=r"top_k=3\.0: must be an integer"):
        SamplingParams(top_k=scalar(3.0))
    with pytest.raises(RequestError, match="temperature=True: must be a number"):
        SamplingParams(temperature=scalar(True))


def test_equal_hashable_and_picklable() -> None:
    params = SamplingParams(temperature=0.5, seed=3)
    assert params == pickle.loads(pickle.dumps(params))
    assert len({params, SamplingParams(temperature=0.5, seed=3)}) == 1


def test_lists_become_tuples_that_nobody_can_change() -> None:
    ids = [3]
    calls: list[Any] = [max]
    params = SamplingParams(stop=["a", "b"], stop_token_ids=ids, logits_processors=calls)
    ids.append(4)
    calls.append(min)
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (3,)
    assert params.logits_processors == (max,)
    assert SamplingParams(stop="ab").stop == ("ab",)
    hash(params)


def test_the_outputs_of_one_request_are_requests_with_one_seed() -> None:
    params = SamplingParams(n=3, seed=5, prompt_logprobs=1, top_k=4)
    each = [params.of_output(i) for i in range(3)]
    assert [one.n for one in each] == [1, 1, 1]
    assert [one.seed for one in each] == [5, 5, 5]
    assert [one.prompt_logprobs for one in each] == [1, None, None]
    assert {one.top_k for one in each} == {4}
    assert SamplingParams(n=3).of_output(2).seed is None


def test_an_option_that_another_option_needs_is_refused_without_it() -> None:
    for name, of in (
        ("prompt_logprobs_start", "prompt_logprobs"),
        ("hidden_states_start", "hidden_states"),
    ):
        with pytest.raises(RequestError, match=f"{name}=3: has no effect without {of}"):
            SamplingParams(**dict.fromkeys([name], 3))  # type: ignore[arg-type]
    both = SamplingParams(prompt_logprobs=2, prompt_logprobs_start=3, hidden_states=1, n=2)
    assert both.of_output(0).prompt_logprobs_start == 3
    later = both.of_output(1)
    assert (later.prompt_logprobs, later.prompt_logprobs_start) == (None, 0)


def test_numbers_of_numpy_in_a_bias_become_numbers_of_python() -> None:
    bias = {token: np.float32(-1.5) for token in np.array([6, 5])}
    stored = SamplingParams(logit_bias=bias).logit_bias
    assert stored == ((5, -1.5), (6, -1.5))
    assert {type(x) for pair in stored for x in pair} == {int, float}
