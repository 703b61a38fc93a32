from __future__ import annotations

import pickle
import re

import pytest

from utils import errors
from utils.errors import ConfigError, FieldError, RequestError, did_you_mean

TREE = {
    "FieldError": ("AllmosError",),
    "ConfigError": ("FieldError", "ValueError"),
    "RequestError": ("FieldError", "ValueError"),
    "RequestTooLongError": ("RequestError",),
    "CheckpointError": ("AllmosError",),
    "CheckpointNotFoundError": ("CheckpointError", "FileNotFoundError"),
    "UnsupportedModelError": ("CheckpointError",),
    "WeightsError": ("CheckpointError",),
    "OutOfMemoryError": ("AllmosError", "MemoryError"),
    "StepError": ("AllmosError",),
    "PlanError": ("ContractError", "StepError"),
    "KVSanitizerError": ("PlanError",),
    "ContractError": ("AllmosError",),
    "WorkerDiedError": ("AllmosError",),
    "EngineClosedError": ("AllmosError", "RuntimeError"),
    "EngineUseError": ("AllmosError", "RuntimeError"),
    "LogitsError": ("AllmosError",),
}


@pytest.mark.parametrize("name", TREE)
def test_bases(name: str) -> None:
    assert tuple(base.__name__ for base in getattr(errors, name).__bases__) == TREE[name]


def test_the_tree_in_the_docstring_is_complete() -> None:
    doc = errors.__doc__
    assert doc is not None
    assert set(re.findall(r"─ (\w+)", doc)) == set(TREE)
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.AllmosError)
    }
    assert defined == {*TREE, "AllmosError"}


def test_a_field_error_says_what_was_wrong_and_what_to_do() -> None:
    error = FieldError("size", "big", "is no number", "Use 3.")
    assert str(error) == "size='big': is no number. Use 3."
    assert (error.field, error.value, error.fix) == ("size", "big", "Use 3.")


def test_long_values_are_cut_in_the_message_alone() -> None:
    error = FieldError("prompt", [1] * 1000, "is bad", "Mend it.")
    assert len(str(error)) < 130
    assert len(error.value) == 1000  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ConfigError("a", 1, "b", "c"), errors.StepError("x")])
def test_errors_survive_the_way_between_processes(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_did_you_mean() -> None:
    assert did_you_mean("apfel", ["apple", "pear"]) == "Did you mean 'apple'?"
    assert did_you_mean("zzz", ["pear", "apple"]) == "Known: apple, pear."


def test_a_value_without_a_name_is_shown_by_its_type() -> None:
    class Bad:
        def __repr__(self) -> str:
            raise KeyError("no name")

    assert str(RequestError("temperature", Bad(), "is wrong", "Use 1.")).startswith(
        "temperature=<Bad>: is wrong"
    )
