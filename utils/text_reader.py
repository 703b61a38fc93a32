"""Converts the tokens of a growing output to text, and ends the text before a stop string."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from utils.stop_strings import StopFinder, StopStrings
from utils.text import REPLACEMENT, Decode, Decoder


class TextReader:
    """Decodes a growing output to text, and finds the first stop string in the text.

    Prompt and output are decoded together, and the decoded prompt is removed from the result. So a
    space between prompt and output is in the text. If a character's bytes are in several tokens,
    the character is added to `text` after the last of these tokens is read. Invalid bytes become
    U+FFFD, which is added with the next valid character or at the end of the output. Text that
    later tokens can change waits until they no longer can (`Decoder.is_part`). If this is never
    known (`Decoder.grows` is False), all text is added at the end of the output.

    Args:
        decode: a `Decoder`, or a function that decodes token ids.
        stop: the stop strings. Requests can share a `StopStrings`.
        min_tokens: stop strings that end within the first `min_tokens` tokens are ignored.
        prompt: token ids of the prompt.
        includes_stop: whether `text` has the stop string that ends the output.
    """

    def __init__(
        self,
        decode: Decode,
        stop: tuple[str, ...] | StopStrings | None = None,
        min_tokens: int = 0,
        prompt: Sequence[int] = (),
        *,
        includes_stop: bool = False,
    ) -> None:
        self._decoder = decode if isinstance(decode, Decoder) else Decoder(decode)
        self._prompt, self._min_tokens = prompt, min_tokens
        if isinstance(stop, tuple):
            stop = StopStrings(stop, self._decoder.specials) if stop else None
        self._stops = StopFinder(stop) if stop else None
        self._includes_stop = includes_stop
        self._parts: list[str] = []  # the text so far
        self.num_chars = 0  # number of characters of the text so far
        self.num_tokens = 0  # number of tokens read; tokens after a stop string are never read
        self.stopped = False  # whether a stop string was found
        self.stop_string: str | None = None  # the stop string that was found
        # A token's text may depend on the tokens before. So `_look` decodes the tokens `_window`
        # together. Their text begins with `_known`, which is already in `text` or in the prompt.
        # The first `_base` of these tokens end with a whole character.
        self._window: list[int] | None = None
        self._known, self._base = "", 0
        # The last look was at `_size` tokens of `_window`. It left the text `_new` after `_known`.
        # The next look is due at `_due` tokens of `_window`.
        self._size = self._due = 0
        self._new = ""
        self._unseen: list[int] = []  # tokens since the last look, if there are stop strings

    @property
    def text(self) -> str:
        """The text so far. It has the stop string only if `includes_stop` is True."""
        return "".join(self._parts)

    @property
    def settled(self) -> int:
        """Number of leading characters of `text` that cannot become part of a stop string."""
        held = 0 if self.stopped or self._stops is None else self._stops.held
        return self.num_chars - held

    def since(self, start: int) -> str:
        """Return the text after its first `start` characters. The cost grows with the result."""
        missing, at = self.num_chars - start, len(self._parts)
        while missing > 0:
            at -= 1
            missing -= len(self._parts[at])
        parts = self._parts[at:]
        return "".join([parts[0][-missing:], *parts[1:]]) if parts else ""

    def read(self, token_ids: list[int], *, ended: bool, start: int = 0) -> bool:
        """Append to `text` the text of those tokens that are not read yet. Return `stopped`.

        The whole output is `token_ids` from the index `start` on. If `ended`, an incomplete last
        character becomes U+FFFD.
        """
        if self._window is None:
            self._window = self._decoder.context(self._prompt)
            self._base = self._size = len(self._window)
            self._known = self._decoder.decode(self._window) if self._window else ""
        specials, window, stops = self._decoder.specials, self._window, self._stops
        marks = stops.marks if stops else {}
        while start + self.num_tokens < len(token_ids) and not self.stopped:
            token = token_ids[start + self.num_tokens]
            self.num_tokens += 1
            if stops:
                self._unseen.append(token)
            if token not in specials:
                window.append(token)
            elif token in marks and self.num_tokens > self._min_tokens:
                self._look(window, special=token)
                continue
            # Without stop strings, the last look alone gives all the rest of the text.
            if (stops or not ended) and (
                len(window) >= self._due or self.num_tokens == self._min_tokens
            ):
                self._look(window)
        if ended and not self.stopped:
            self._look(window, ended=True)
        return self.stopped

    def _look(self, window: list[int], *, special: int | None = None, ended: bool = False) -> None:
        """Decode `window`, look for stop strings, append the text that no later token changes."""
        stops, grows = self._stops, self._decoder.grows
        keeps = ended or (grows and not (window and self._decoder.is_part(window[-1])))
        if not keeps and stops is None:
            return
        new = self._decoded(window) if len(window) > self._size else self._new
        sure = new if ended else new.rstrip(REPLACEMENT)
        if stops is not None:
            if self.num_tokens <= self._min_tokens:
                stops.ignore(sure)
            elif stops.look(sure if special is None else new, special):
                self._stop(stops, sure if special is None else new, special)
                return
        self._unseen, self._size = [], len(window)
        if keeps:
            if stops is not None:
                stops.append(sure, len(new) - len(sure))
            self._append(sure)
            self._known += sure
            new = new[len(sure) :]
        self._new = new
        if keeps and not new and not ended:
            self._move(window)
        # A window that does not become shorter is decoded again when it is an eighth longer. So
        # the time is linear in the number of tokens.
        self._due = len(window) + 1 + (len(window) // 8 if len(window) == self._size else 0)
        self._size = len(window)

    def _append(self, new: str) -> None:
        parts = self._parts
        if new:
            parts.append(new)
            self.num_chars += len(new)
        # Short parts at the end are joined until each part is more than twice as long as the next
        # one. So there are few parts, and a character is not copied for each later token.
        while len(parts) > 1 and 2 * len(parts[-1]) >= len(parts[-2]):
            parts[-2:] = [parts[-2] + parts[-1]]

    def _decoded(self, window: list[int]) -> str:
        """Return the text of `window` after `_known`."""
        text = self._decoder.decode(window)
        if text.startswith(self._known):
            return text[len(self._known) :]
        return self._decoder.decode(window[self._base :])

    def _move(self, window: list[int]) -> None:
        """Drop the tokens of `window` before `_base`, and move `_base` to the end."""
        rest = window[self._base :]
        # The window must keep a token with text. Otherwise the decoder would treat the next token
        # as the first one of a text, for example without its space.
        if rest and (known := self._decoder.decode(rest)):
            self._known, window[:] = known, rest
        self._base = len(window)

    def _stop(self, stops: StopFinder, new: str, special: int | None) -> None:
        """Cut the text at the stop string that ends in the new text `new`."""
        assert self._window is not None
        before, start = self.num_tokens - len(self._unseen), self._window[: self._size]

        def text(count: int) -> str:
            tokens = self._unseen[: count - before]
            added = [token for token in tokens if token not in self._decoder.specials]
            return self._decoded(start + added).rstrip(REPLACEMENT)

        def stopped(count: int) -> bool:
            return stops.first(text(count), before_special=special is not None) is not None

        # Find the first of the tokens since the last look whose text ends a stop string.
        counts = range(before + 1, self.num_tokens)
        at = bisect_left(counts, True, key=stopped)
        earlier = at < len(counts)
        if earlier:
            self.num_tokens, new = counts[at], text(counts[at])
        found = stops.first(new, before_special=earlier and special is not None)
        assert found is not None
        first, self.stop_string = found
        whole, self._parts, self.num_chars = self.text + new, [], 0
        end = self.stop_string if self._includes_stop else ""
        self._append(whole[: len(whole) - len(new) + first] + end)
        self.stopped = True
