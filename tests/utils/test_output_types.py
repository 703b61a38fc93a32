"""Outputs are dictionaries with attributes; log-probabilities are floats that know more."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from utils.output_types import Logprob, Output

ENTRIES: dict[str, Any] = {"text": "a", "token_ids": [1, 2], "error": None}


@pytest.fixture
def out() -> Output:
    return Output(ENTRIES)


def test_entries_are_attributes(out: Output) -> None:
    assert (out.text, out["text"], out.get("text")) == ("a", "a", "a")
    assert out.token_ids is out["token_ids"]
    out.text = "b"
    out.more = 1
    assert (out["text"], out["more"]) == ("b", 1)
    del out.more
    assert "more" not in out
    assert set(dir(out)) >= {*ENTRIES, "items", "get"}


def test_it_is_a_dictionary(out: Output) -> None:
    assert isinstance(out, dict)
    assert out == ENTRIES
    assert ENTRIES.__eq__(out)
    assert out != {**ENTRIES, "text": "b"}
    assert list(out) == list(ENTRIES)
    assert list(out.items()) == list(ENTRIES.items())
    assert {**out} == ENTRIES
    assert repr(out) == repr(ENTRIES)
    assert json.loads(json.dumps(out)) == ENTRIES
    match out:
        case {"text": text}:
            assert text == "a"


def test_what_is_no_entry_is_named(out: Output) -> None:
    with pytest.raises(AttributeError, match=r"no entry 'texts'. Did you mean 'text'\?"):
        _ = out.texts
    with pytest.raises(AttributeError, match=r"Known: error, text, token_ids\."):
        _ = out.xyzzy
    with pytest.raises(AttributeError, match="xyzzy"):
        del out.xyzzy
    with pytest.raises(KeyError):
        _ = out["texts"]
    assert not hasattr(out, "__array__")
    assert getattr(out, "texts", 5) == 5


@pytest.mark.parametrize("name", ["items", "keys", "get", "update", "__class__"])
def test_methods_of_dictionaries_are_no_entries(out: Output, name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        setattr(out, name, 5)
    assert dict(out) == ENTRIES


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled(out: Output, protocol: int) -> None:
    found = pickle.loads(pickle.dumps(Output(out, outputs=[out]), protocol))
    assert type(found) is type(found.outputs[0]) is Output
    assert found == {**ENTRIES, "outputs": [ENTRIES]}


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, Output.copy], ids=str)
def test_copied(out: Output, copied: Any) -> None:
    found = copied(out)
    assert type(found) is Output
    assert found == out
    assert found is not out
    assert (found.token_ids is out.token_ids) == (copied is not copy.deepcopy)
    found.text = "b"
    assert out.text == "a"


def test_a_log_probability_is_a_float() -> None:
    one = Logprob(-0.25, 3, " the")
    assert (one, one.logprob, one.rank, one.decoded_token) == (-0.25, -0.25, 3, " the")
    assert type(one.logprob) is float
    assert one + 1 == 0.75
    assert json.dumps({5: one}) == '{"5": -0.25}'
    assert repr(one) == "Logprob(logprob=-0.25, rank=3, decoded_token=' the')"
    for found in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert (type(found), found, found.rank, found.decoded_token) == (Logprob, one, 3, " the")
    assert (Logprob(-1.0).rank, Logprob(-1.0).decoded_token) == (None, None)
