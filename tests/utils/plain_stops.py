"""Stop strings in the plainest way: each search is for each of them, in the whole text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def all_stops(text: str, stops: Sequence[str], after: int = 0) -> list[tuple[int, int]]:
    """Where stop strings begin that end behind the first `after` characters, and their indices."""
    return [
        (at, index)
        for at in range(len(text))
        for index, stop in enumerate(stops)
        if text.startswith(stop, at) and at + len(stop) > after
    ]


def first_stop(text: str, stops: Sequence[str], after: int = 0) -> tuple[int, int] | None:
    """Where the first of these stop strings begins, and the least index of one that does."""
    return min(all_stops(text, stops, after), default=None)


def held(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` that begins a stop string, and may become longer."""
    longest = max(map(len, stops))
    sizes = range(min(longest - 1, len(text)), 0, -1)
    return next((n for n in sizes if any(s.startswith(text[-n:]) for s in stops)), 0)


class Spelled:
    """A text in which each special token that a stop string names is a character of its own."""

    def __init__(self, stops: Sequence[str], specials: Mapping[int, str]) -> None:
        named = [token for token, name in specials.items() if any(name in s for s in stops)]
        self.marks = {token: chr(0xE000 + i) for i, token in enumerate(named)}
        self.stops = list(stops)
        for token in sorted(named, key=lambda t: -len(specials[t])):
            self.stops = [s.replace(specials[token], self.marks[token]) for s in self.stops]
        self.text = ""

    def bare(self, text: str) -> int:
        """Number of characters of `text` that are no special token."""
        return sum(char not in self.marks.values() for char in text)

    def add(self, new: str, token: int | None) -> tuple[int, int] | None:
        """Add text and a token. If a stop string ends there, return where the first one begins.

        Bare characters before it are counted. Also return the index of the stop string.
        """
        before = len(self.text)
        self.text += new + ("" if token is None else self.marks.get(token, ""))
        found = all_stops(self.text, self.stops, before)
        return min(((self.bare(self.text[:at]), index) for at, index in found), default=None)

    @property
    def held(self) -> int:
        size = held(self.text, self.stops)
        return self.bare(self.text[len(self.text) - size :])


def stopped_text(
    texts: Sequence[str],
    output: Sequence[int],
    stops: Sequence[str],
    specials: Mapping[int, str],
    min_tokens: int,
) -> tuple[str, int, str | None]:
    """Text and number of tokens of an output that its first stop string ends, and this string.

    Args:
        texts: the text of the first k tokens, for each k from 0 on. None changes an earlier one.
    """
    spelled = Spelled(stops, specials)
    for count, token in enumerate(output, 1):
        text, before = texts[count], len(texts[count - 1])
        found = [first_stop(text, stops, before)]
        found.append(spelled.add(text[before:], token if count > min_tokens else None))
        if any(found) and count > min_tokens:
            at, index = min(filter(None, found))
            return text[:at], count, stops[index]
    return texts[-1], len(output), None
