"""Converts the tokens of a growing output to text, and finds stop strings in the text."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from utils.text import REPLACEMENT, Decode, Decoder

# Lone surrogates, which no decoded text contains. They stand for special tokens in `StopStrings`.
_MARK = re.compile("[\ud800-\udfff]")


class StopStrings:
    """Finds the first stop string in a growing text, and counts characters that may begin one.

    A special token has no text. If a stop string contains the name of a special token, then the
    token counts as one character, `marks[token]`, which stands for the name in the stop string.
    """

    def __init__(self, stop: tuple[str, ...], specials: Mapping[int, str]) -> None:
        named = {t: name for t, name in specials.items() if name and any(name in s for s in stop)}
        self.marks = {token: chr(0xD800 + i) for i, token in enumerate(named)}
        self._plain = self._marked = stop
        for token in sorted(named, key=lambda t: -len(named[t])):
            self._marked = tuple(s.replace(named[token], self.marks[token]) for s in self._marked)
        self._longest = max(map(len, stop))
        self._tail = ""  # the end of the text, with marks
        self._waiting: list[tuple[int, str]] = []  # marks in the new text, and places before them
        self._passed = 0  # no stop string may end in the first so many characters of the new text
        self.found = ""  # the stop string that `find` has found last

    def held(self, text: str) -> int:
        """Return how many of the last characters of `text` may become part of a stop string."""
        views = [(text, self._plain), (self._tail, self._marked)][: 1 + bool(self.marks)]
        for size in range(self._longest - 1, 0, -1):
            for seen, stops in views:
                if size <= len(seen) and any(s.startswith(seen[-size:]) for s in stops):
                    return len(_MARK.sub("", seen[-size:]))
        return 0

    def find(self, text: str, new: str) -> int | None:
        """Return where the first of the stop strings that end in `new` begins in `text` + `new`."""
        views = [(text[-self._longest :], new, self._plain)]
        if self.marks:
            views.append((self._tail, self._spelled(new), self._marked))
        cut = 0
        for old, added, stops in views:
            seen, behind = old + added, len(old) + self._passed
            for stop, given in zip(stops, self._plain, strict=True):
                # The operator `in` is faster than `find`. Most texts have no stop string.
                if stop in seen and (at := seen.find(stop, max(0, behind + 1 - len(stop)))) >= 0:
                    size = len(_MARK.sub("", seen[at:])) + 1
                    cut, self.found = (size, given) if size > cut else (cut, self.found)
        return len(text) + len(new) + 1 - cut if cut else None

    def put(self, token: int, place: int) -> None:
        """Count a token of `marks` as text after the first `place` characters of the new text."""
        self._waiting = [*self._waiting, (place, self.marks[token])][-self._longest :]

    def ignore(self, new: str) -> None:
        """Ignore stop strings that end in `new`, which is the beginning of the new text."""
        self._passed = max(self._passed, len(new))

    def append(self, new: str, left: int) -> None:
        """Add to the text its next characters `new`, behind which `left` characters are left."""
        self._passed = max(0, self._passed - len(new))
        if self.marks:
            size = len(new)
            waiting = [(min(place, size + left), mark) for place, mark in self._waiting]
            self._waiting = [one for one in waiting if one[0] <= size]
            self._tail = (self._tail + self._spelled(new))[-self._longest :]
            self._waiting = [(place - size, mark) for place, mark in waiting if place > size]

    def _spelled(self, new: str) -> str:
        """Return `new` with the waiting marks."""
        text, at = "", 0
        for place, mark in self._waiting:
            text += new[at:place] + mark
            at = max(at, place)
        return text + new[at:]


class TextReader:
    """Decodes a growing output to text, and finds the first stop string in the text.

    The text of an output is the decoded prompt and output together, without the decoded prompt. So
    a space between prompt and output is in the text. If a character's bytes are in
    several tokens, the character is added to `text` after the last of these tokens is read. Invalid
    bytes become U+FFFD, which is added with the next valid character or at the end of the output.
    Text that later tokens can change is added when they no longer can (`Decoder.is_part`), or at
    the end of the output (`Decoder.grows`). Stop strings within the first `min_tokens` tokens are
    ignored. `prompt` are the token ids of the prompt. If `includes_stop`, the stop string that ends
    the output is added to the text.
    """

    def __init__(
        self,
        decode: Decode,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        prompt: Sequence[int] = (),
        *,
        includes_stop: bool = False,
    ) -> None:
        self.decoder = self._decoder = decode if isinstance(decode, Decoder) else Decoder(decode)
        self._prompt, self._min_tokens = prompt, min_tokens
        self._stops = StopStrings(stop, self._decoder.specials) if stop else None
        self.text = ""  # the text so far, without the stop string
        self.num_tokens = 0  # number of tokens read; tokens after a stop string are never read
        self.stopped = False  # whether a stop string was found
        self.stop_string: str | None = None  # the stop string that was found
        self._includes_stop = includes_stop
        # A token's text may depend on the tokens before. So `_look` decodes the tokens `_window`
        # together. Their text begins with `_known`, which is already in `text` or in the prompt.
        # The first `_base` of these tokens end with a whole character.
        self._window: list[int] | None = None
        self._known, self._base = "", 0
        # The last look was at `_size` tokens of `_window`, after `_seen` tokens of the output. It
        # left the text `_new` after `_known`. The next look is due at `_due` tokens of `_window`.
        self._size = self._seen = self._due = 0
        self._new = ""

    @property
    def settled(self) -> int:
        """Number of leading characters of `text` that cannot become part of a stop string."""
        held = 0 if self.stopped or self._stops is None else self._stops.held(self.text)
        return len(self.text) - held

    def read(self, token_ids: list[int], *, ended: bool) -> bool:
        """Append to `text` the text of those `token_ids` that are not read yet. Return `stopped`.

        `token_ids` is the whole output. If `ended`, an incomplete last character becomes U+FFFD.
        """
        if self._window is None:
            self._window = self._decoder.context(self._prompt)
            self._base = self._size = len(self._window)
            self._known = self._decoder.decode(self._window) if self._window else ""
        specials, window = self._decoder.specials, self._window
        marks = self._stops.marks if self._stops else {}
        while self.num_tokens < len(token_ids) and not self.stopped:
            token = token_ids[self.num_tokens]
            self.num_tokens += 1
            if token not in specials:
                window.append(token)
            elif token in marks and self.num_tokens > self._min_tokens:
                self._look(window, token_ids, special=token)
                continue
            # Without stop strings, the last look alone gives all the rest of the text.
            if (self._stops or not ended) and (
                len(window) >= self._due or self.num_tokens == self._min_tokens
            ):
                self._look(window, token_ids)
        if ended and not self.stopped:
            self._look(window, token_ids, ended=True)
        return self.stopped

    def _look(
        self,
        window: list[int],
        token_ids: list[int],
        *,
        special: int | None = None,
        ended: bool = False,
    ) -> None:
        """Decode `window`, look for stop strings, append the text that no later token changes."""
        stops, grows = self._stops, self._decoder.grows
        keeps = ended or (grows and not (window and self._decoder.is_part(window[-1])))
        if not keeps and stops is None:
            return
        new = self._decoded(window) if len(window) > self._size else self._new
        sure = new if ended else new.rstrip(REPLACEMENT)
        if stops is not None:
            if special is not None:
                stops.put(special, len(new))
            if self.num_tokens <= self._min_tokens:
                stops.ignore(sure)
            elif self._stop(stops, token_ids, sure if special is None else new):
                return
        self._seen, self._size = self.num_tokens, len(window)
        if keeps:
            if stops is not None:
                stops.append(sure, len(new) - len(sure))
            self.text += sure
            self._known += sure
            new = new[len(sure) :]
        self._new = new
        if keeps and not new and not ended:
            self._move(window)
        # A window that does not become shorter is decoded again when it is an eighth longer. So
        # the time is linear in the number of tokens.
        self._due = len(window) + 1 + (len(window) // 8 if len(window) == self._size else 0)
        self._size = len(window)

    def _decoded(self, window: list[int]) -> str:
        """Return the text of `window` after `_known`."""
        text = self._decoder.decode(window)
        if text.startswith(self._known):
            return text[len(self._known) :]
        return self._decoder.decode(window[self._base :])

    def _move(self, window: list[int]) -> None:
        """Drop the tokens of `window` before `_base`, and move `_base` to the end."""
        rest = window[self._base :]
        # A window without text would not show that its next token is not the first one.
        if rest and (known := self._decoder.decode(rest)):
            self._known, window[:] = known, rest
        self._base = len(window)

    def _stop(self, stops: StopStrings, token_ids: list[int], new: str) -> bool:
        """If a stop string ends in `new`, cut the text there. Return whether one does."""
        if stops.find(self.text, new) is None:
            return False
        assert self._window is not None
        first, start = self._seen + 1, self._window[: self._size]

        def text(count: int) -> str:
            added = [t for t in token_ids[self._seen : count] if t not in self._decoder.specials]
            return self._decoded(start + added).rstrip(REPLACEMENT)

        # Find the first of the tokens since the last look whose text ends a stop string.
        counts = range(first, self.num_tokens)
        at = bisect_left(counts, True, key=lambda n: stops.find(self.text, text(n)) is not None)
        if at < len(counts):
            self.num_tokens, new = counts[at], text(counts[at])
        self.text = (self.text + new)[: stops.find(self.text, new)]
        self.stopped, self.stop_string = True, stops.found
        self.text += stops.found if self._includes_stop else ""
        return True
