from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from sampling_params import SamplingParams


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


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=0.5)  # type: ignore[call-arg]


def test_equal_hashable_and_picklable() -> None:
    params = SamplingParams(temperature=0.5, seed=3)
    assert params == pickle.loads(pickle.dumps(params))
    assert len({params, SamplingParams(temperature=0.5, seed=3)}) == 1
