"""Finds the first of many stop strings in a growing text, a character at a time.

The search is that of Aho and Corasick ("Efficient string matching", CACM 18(6), 1975). One
automaton finds all stop strings of a request. The automaton's state stands for the longest suffix
of the text that is a prefix of a stop string. A new character leads from a state to the next one.
So the number of operations for a text depends on its length, and not on the number of stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from weakref import WeakValueDictionary


class _Automaton:
    """The automaton of some strings. A state is a number that stands for a prefix of a string.

    State 0 stands for the empty prefix. Characters in `marks` are no text, and are not counted.
    """

    def __init__(self, strings: Sequence[str], marks: Collection[str]) -> None:
        # For each state, the states whose prefixes are one character longer, by this character.
        self._edges: list[dict[str, int]] = [{}]
        # For each state, the state of its longest proper suffix that is a prefix of a string.
        self._fail = [0]
        # For each state, the longest string that is a suffix of the state: its length in
        # characters of text, and minus its index. None if no string is a suffix.
        self._ends: list[tuple[int, int] | None] = [None]
        # For each state, how many characters of text may become part of a string that is not
        # complete.
        self.held = [0]
        for index, string in enumerate(strings):
            state = 0
            for char in string:
                if char not in self._edges[state]:
                    self._edges[state][char] = len(self._edges)
                    self._edges.append({})
                    self._fail.append(0)
                    self._ends.append(None)
                    self.held.append(self.held[state] + (char not in marks))
                state = self._edges[state][char]
            self._ends[state] = self._ends[state] or (self.held[state], -index)
        self._link(max(map(len, strings)))

    def _link(self, longest: int) -> None:
        """Set `_fail`, from short prefixes to long ones. Then complete `_ends` and `held`."""
        edges, fail, ends = self._edges, self._fail, self._ends
        todo = deque((0, char, child, 1) for char, child in edges[0].items())
        while todo:
            parent, char, state, length = todo.popleft()
            if parent:
                back = fail[parent]
                while back and char not in edges[back]:
                    back = fail[back]
                fail[state] = edges[back].get(char, 0)
            # With marks, two such strings can have equally many characters of text.
            both = ends[state], ends[fail[state]]
            ends[state] = max(filter(None, both), default=None)
            if length == longest:
                self.held[state] = self.held[fail[state]]
            todo.extend((state, *edge, length + 1) for edge in edges[state].items())

    def read(
        self, state: int, text: str, start: int = 0, passed: int = 0
    ) -> tuple[int, tuple[int, int] | None]:
        """Read `text` in a state. Return the next state, and where the first string begins.

        Also return the index of the string. If several strings begin there, the least index is
        returned. Places are counted so that `text` begins at `start`. Only strings that end behind
        the place `passed` count. If there are none, None is returned.
        """
        edges, fail, ends = self._edges, self._fail, self._ends
        first: tuple[int, int] | None = None
        for place, char in enumerate(text, start + 1):
            while (longer := edges[state].get(char)) is None and state:
                state = fail[state]
            state = longer or 0
            if (end := ends[state]) and place > passed:
                found = place - end[0], -end[1]
                first = found if first is None else min(first, found)
        return state, first


class StopStrings:
    """The automata of a tuple of stop strings. They never change, so requests can share them.

    A special token has no text. If a stop string contains the name of a special token, then the
    token counts as one character, `marks[token]`, which stands for the name in the stop string. A
    second automaton has the stop strings with these characters.

    Args:
        stop: the stop strings, none of them empty.
        specials: the name of each special token, by token id.
    """

    def __init__(self, stop: tuple[str, ...], specials: Mapping[int, str]) -> None:
        self.stop, self.specials = stop, specials
        # The separator keeps a name from matching across two stop strings. It is a lone surrogate,
        # which decoded text never contains.
        joined = "\udfff".join(stop)
        named = {token: name for token, name in specials.items() if name and name in joined}
        # Lone surrogates stand for special tokens.
        self.marks = {token: chr(0xD800 + i) for i, token in enumerate(named)}
        self.longest = max(map(len, stop))
        self.automata = [_Automaton(stop, ())]
        if named:
            marked = stop
            for token in sorted(named, key=lambda t: -len(named[t])):
                marked = tuple(s.replace(named[token], self.marks[token]) for s in marked)
            self.automata.append(_Automaton(marked, set(self.marks.values())))


class SharedStopStrings:
    """Makes `StopStrings`. Requests with the same stop strings share one `StopStrings` object.

    The automata of 1,000 stop strings are large. They are freed when their last request is freed.
    """

    def __init__(self) -> None:
        # By the stop strings and the identity of the special tokens, which `StopStrings` keeps.
        self._known: WeakValueDictionary[tuple[object, int], StopStrings] = WeakValueDictionary()

    def of(self, stop: tuple[str, ...], specials: Mapping[int, str]) -> StopStrings | None:
        """Return the `StopStrings` of some stop strings; None if there are none."""
        if not stop:
            return None
        known = self._known.get((stop, id(specials)))
        if known is None:
            self._known[stop, id(specials)] = known = StopStrings(stop, specials)
        return known


class StopFinder:
    """Finds the first stop string in the text of one output, and counts held characters.

    The text grows in two steps. `look` reads new text that later tokens may still change. `append`
    adds to the text the beginning of the new text, which no later token changes.
    """

    def __init__(self, stops: StopStrings) -> None:
        self.marks = stops.marks
        self._stops = stops
        # For each automaton, the state after the text, and the state after the last look.
        self._states = self._looked = [0] * len(stops.automata)
        # The new text at the last look; None if `_looked` cannot be used.
        self._seen: str | None = ""
        self._waiting: list[tuple[int, str]] = []  # places in the new text, and the mark at each
        self._passed = 0  # no stop string may end in the first so many characters of the new text

    @property
    def held(self) -> int:
        """How many of the last characters of the text may become part of a stop string."""
        both = zip(self._stops.automata, self._states, strict=True)
        return max(automaton.held[state] for automaton, state in both)

    def look(self, new: str, special: int | None = None) -> bool:
        """Return whether a stop string ends in the new text, which is `new`.

        `special` is a token of `marks` that follows. The caller looks again only if the result is
        False. So text that was there at the last look is not read again.
        """
        marks = [] if special is None else [(len(new), self.marks[special])]
        self._waiting = [*self._waiting, *marks][-self._stops.longest :]
        if self._seen is not None and new.startswith(self._seen):
            found = self._read(self._looked, new, marks, len(self._seen))
        else:
            found = self._read(self._states, new, self._waiting)
        self._looked, first = found
        # If a mark is after the end of `new`, more text may still come before the mark. Then this
        # look cannot be continued.
        self._seen = new if all(place <= len(new) for place, _ in self._waiting) else None
        return first is not None

    def first(self, new: str, *, before_special: bool = False) -> tuple[int, str] | None:
        """Return where the first of the stop strings that end in the new text `new` begins.

        Also return the stop string: of those that begin there, the first in the request's list. The
        place is counted from the beginning of `new`, so it can be negative. The special token of
        the last look does not count if `before_special`.
        """
        marks = self._waiting[:-1] if before_special else self._waiting
        found = self._read(self._states, new, marks)[1]
        return found and (found[0], self._stops.stop[found[1]])

    def ignore(self, new: str) -> None:
        """Ignore stop strings that end in `new`, which is the beginning of the new text."""
        self._passed = max(self._passed, len(new))

    def append(self, new: str, left: int) -> None:
        """Add to the text its next characters `new`, behind which `left` characters are left."""
        size = len(new)
        waiting = [(min(place, size + left), mark) for place, mark in self._waiting]
        self._waiting = [(place - size, mark) for place, mark in waiting if place > size]
        if new == self._seen and not self._waiting:
            self._states = self._looked
        else:
            marks = [one for one in waiting if one[0] <= size]
            self._states, _ = self._read(self._states, new, marks)
        self._passed = max(0, self._passed - size)
        self._looked, self._seen = self._states, None if self._waiting else ""

    def _read(
        self, states: list[int], new: str, marks: list[tuple[int, str]], start: int = 0
    ) -> tuple[list[int], tuple[int, int] | None]:
        """Read `new` from `start` on, in `states`. Return the next states, and the first string."""
        reached, passed = [], self._passed
        found: list[tuple[int, int] | None] = []
        for i, (automaton, begin) in enumerate(zip(self._stops.automata, states, strict=True)):
            state, at = begin, start
            for place, mark in marks if i else ():
                end = max(at, min(place, len(new)))
                state, in_text = automaton.read(state, new[at:end], at, passed)
                # A mark has no character. One at the place `passed` is behind the ignored text.
                state, at_mark = automaton.read(state, mark, end - 1, passed - 1)
                found += [in_text, at_mark]
                at = end
            state, last = automaton.read(state, new[at:], at, passed)
            found.append(last)
            reached.append(state)
        return reached, min(filter(None, found), default=None)
