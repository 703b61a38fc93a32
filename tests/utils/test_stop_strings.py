"""The automata of stop strings, beside a search of the whole text for each stop string."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.utils.plain_stops import Spelled, first_stop, held
from utils.stop_strings import SharedStopStrings, StopFinder, StopStrings
from utils.text import Decoder
from utils.text_reader import TextReader

SPECIALS = {500: "<x>", 501: "<x><y>", 502: "<y>"}
LETTERS = st.text(alphabet="ab", min_size=1, max_size=5)
STOPS = st.lists(LETTERS | st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=6)
MARKED = st.lists(
    st.lists(LETTERS | st.sampled_from(list(SPECIALS.values())), min_size=1, max_size=4).map(
        "".join
    ),
    min_size=1,
    max_size=4,
)


def _finder(stops: list[str], specials: dict[int, str] | None = None) -> StopFinder:
    return StopFinder(StopStrings(tuple(stops), specials or {}))


@settings(max_examples=500, deadline=None)
@given(STOPS, st.lists(st.text(alphabet="abc", max_size=5), max_size=12))
def test_every_piece_of_a_text(stops: list[str], pieces: list[str]) -> None:
    finder, text = _finder(stops), ""
    for piece in pieces:
        expected = first_stop(text + piece, stops, len(text))
        assert finder.look(piece) == (expected is not None)
        if expected is not None:
            assert finder.first(piece) == (expected[0] - len(text), stops[expected[1]])
            return
        finder.append(piece, 0)
        text += piece
        assert finder.held == held(text, stops)


@settings(max_examples=500, deadline=None)
@given(
    STOPS,
    st.lists(
        st.tuples(
            st.text(alphabet="abc", max_size=6), st.none() | st.integers(0, 6), st.booleans()
        ),
        max_size=12,
    ),
)
def test_new_text_that_changes_and_is_ignored(
    stops: list[str], steps: list[tuple[str, int | None, bool]]
) -> None:
    """Each step has a new text, of which so many characters are appended; None: no call at all."""
    finder, text, passed = _finder(stops), "", 0
    for number, (new, sure, ignores) in enumerate(steps):
        if ignores and number < 3:
            finder.ignore(new)
            passed = max(passed, len(text) + len(new))
        else:
            expected = first_stop(text + new, stops, max(len(text), passed))
            for _ in range(2 if expected is None else 1):
                assert finder.look(new) == (expected is not None)
            if expected is not None:
                assert finder.first(new) == (expected[0] - len(text), stops[expected[1]])
                return
        if sure is not None:
            finder.append(new[:sure], len(new) - len(new[:sure]))
            text += new[:sure]
            assert finder.held == held(text, stops)


@settings(max_examples=500, deadline=None)
@given(
    MARKED,
    st.lists(st.tuples(st.text(alphabet="ab", max_size=3), st.sampled_from([None, 500, 501, 502]))),
)
def test_names_of_special_tokens(stops: list[str], steps: list[tuple[str, int | None]]) -> None:
    """A special token counts as one character in a second text. Both texts are searched."""
    finder, spelled, plain = _finder(stops, SPECIALS), Spelled(stops, SPECIALS), ""
    assert set(finder.marks) == set(spelled.marks)
    for piece, token in steps:
        found = [first_stop(plain + piece, stops, len(plain)), spelled.add(piece, token)]
        assert finder.look(piece, token if token in finder.marks else None) == any(found)
        if any(found):
            at, index = min(filter(None, found))
            assert finder.first(piece) == (at - len(plain), stops[index])
            return
        finder.append(piece, 0)
        plain += piece
        assert finder.held == max(held(plain, stops), spelled.held)


def test_the_end_of_an_ignored_stop_string_may_begin_one() -> None:
    finder = _finder(["aba"])
    finder.ignore("aba")
    finder.append("aba", 0)
    assert finder.held == 1
    assert finder.look("ba")
    assert finder.first("ba") == (-1, "aba")


class _Edges(dict[str, int]):
    """Counts how often an automaton asks for the next state."""

    asked = 0

    def get(self, char: str, default: Any = None) -> Any:
        _Edges.asked += 1
        return super().get(char, default)


def _asked(stops: list[str], pieces: list[str]) -> int:
    """How many states a text costs, a piece at a time."""
    shared = StopStrings(tuple(stops), {})
    for automaton in shared.automata:
        automaton._edges = [_Edges(edges) for edges in automaton._edges]
    finder, _Edges.asked = StopFinder(shared), 0
    for piece in pieces:
        assert not finder.look(piece)
        finder.append(piece, 0)
        _ = finder.held
    return _Edges.asked


@pytest.mark.parametrize("count", [1, 1000])
def test_a_character_is_read_once_whatever_the_stop_strings(count: int) -> None:
    rng = random.Random(0)
    pieces = ["".join(rng.choices("abcde", k=rng.randint(0, 6))) for _ in range(400)]
    stops = ["".join(rng.choices("abcde", k=12)) + "Z" for _ in range(count)]
    size = sum(map(len, pieces))
    assert size <= _asked(stops, pieces) <= 2 * size


def test_failures_are_paid_for_by_the_characters_before() -> None:
    """The end of "aaa...ab" fails over and over: each time by one character."""
    pieces = ["a" * 50, "c", "a" * 120, "c"] * 5
    size = sum(map(len, pieces))
    assert _asked(["a" * 100 + "b", "a" * 60 + "b"], pieces) <= 2 * size


def test_text_that_may_change_is_read_once() -> None:
    """A tokenizer whose text always may change shows the whole new text at each look."""
    shared = StopStrings(("abcabd",), {})
    for automaton in shared.automata:
        automaton._edges = [_Edges(edges) for edges in automaton._edges]
    finder, text, _Edges.asked = StopFinder(shared), "", 0
    for _ in range(500):
        text += "abc"
        assert not finder.look(text)
    assert _Edges.asked <= 2 * len(text)


class TestShared:
    def test_equal_stop_strings_have_one_automaton(self) -> None:
        stops, specials = SharedStopStrings(), {5: "<x>"}
        first = stops.of(("ab", "c"), specials)
        assert first is not None
        assert stops.of(("ab", "c"), specials) is first
        assert stops.of(("c", "ab"), specials) is not first
        assert stops.of((), specials) is None

    def test_other_special_tokens_have_another_one(self) -> None:
        stops = SharedStopStrings()
        first = stops.of(("a<x>",), {5: "<x>"})
        second = stops.of(("a<x>",), {6: "<x>"})
        assert first is not None
        assert second is not None
        assert (list(first.marks), list(second.marks)) == ([5], [6])
        # Requests with and without `skip_special_tokens` may take turns.
        assert stops.of(("a<x>",), first.specials) is first

    def test_they_are_forgotten_with_their_last_request(self) -> None:
        stops, specials = SharedStopStrings(), {5: "<x>"}
        readers = [TextReader(Decoder(str), stops.of(("ab",), specials)) for _ in range(2)]
        assert len(stops._known) == 1
        del readers[0]
        gc.collect()
        assert len(stops._known) == 1
        readers.clear()
        gc.collect()
        assert len(stops._known) == 0

    def test_outputs_do_not_share_what_they_have_read(self) -> None:
        stops = StopStrings(("ab",), {})
        first, second = StopFinder(stops), StopFinder(stops)
        first.append("a", 0)
        assert (first.held, second.held) == (1, 0)
        assert not second.look("b")
        assert first.look("b")
