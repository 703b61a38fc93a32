from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.text import Decode, Decoder, decoder
from utils.text_reader import TextReader

# Found by its tests: no fixture may be used under `given` once per example.
TOKENIZER = Path(__file__).parents[2] / "assets" / "qwen3-tiny-python"
TEXTS = st.text(alphabet="abc \nd\u00e9\u65e5\U0001f600\ufffd", max_size=30)
TOKENS = st.lists(st.integers(0, 4095) | st.integers(3, 260), max_size=40)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def decode(tokenizer: Any) -> Decode:
    return decoder(tokenizer)


def _read(reader: TextReader, tokens: list[int]) -> list[str]:
    """What a stream would tell, token by token."""
    told, parts = 0, []
    for end in range(1, len(tokens) + 1):
        reader.read(tokens[:end], ended=end == len(tokens))
        until = len(reader.text) if end == len(tokens) or reader.stopped else reader.settled
        parts.append(reader.text[told:until])
        told = until
        if reader.stopped:
            break
    return parts


class TestReading:
    def test_pieces_make_the_whole(self, decode: Decode) -> None:
        @settings(max_examples=300, deadline=None)
        @given(TOKENS)
        def check(tokens: list[int]) -> None:
            reader = TextReader(decode)
            pieces = _read(reader, tokens)
            assert "".join(pieces) == reader.text == decode(tokens)
            assert reader.num_tokens == len(tokens)

        check()

    def test_a_character_is_shown_once_though_the_next_one_is_cut_short(self) -> None:
        """As in byte fallback: one byte that is missing makes all bytes beside it invalid."""

        def decode(token_ids: list[int]) -> str:
            try:
                return bytes(token_ids).decode()
            except UnicodeDecodeError:
                return "\ufffd" * len(token_ids)

        text = "\u00e9\u20ac"
        pieces = _read(TextReader(decode), list(text.encode()))
        assert pieces == ["", "\u00e9", "", "", "\u20ac"]

    def test_characters_are_never_split(self, tokenizer: Any, decode: Decode) -> None:
        text = "caf\u00e9 \u65e5\u672c \U0001f600\U0001f468\u200d\U0001f469 x"
        tokens = tokenizer.encode(text)
        assert any("\ufffd" in decode([token]) for token in tokens)
        pieces = _read(TextReader(decode), tokens)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)

    def test_the_pieces_come_as_early_as_they_can(self, tokenizer: Any, decode: Decode) -> None:
        tokens = tokenizer.encode("import os\n")
        assert _read(TextReader(decode), tokens) == [decode([token]) for token in tokens]

    def test_bytes_that_become_no_character_are_shown_at_the_end(
        self, tokenizer: Any, decode: Decode
    ) -> None:
        tokens = tokenizer.encode("a\U0001f600")[:-1]
        assert _read(TextReader(decode), tokens)[-1].startswith("\ufffd")

    def test_the_decoder_is_the_tokenizers(self, tokenizer: Any, decode: Decode) -> None:
        @settings(max_examples=100, deadline=None)
        @given(TOKENS)
        def check(tokens: list[int]) -> None:
            assert decode(tokens) == tokenizer.decode(tokens, skip_special_tokens=True)

        check()

    def test_tokenizers_of_another_make_and_none(self) -> None:
        class Letters:
            def decode(self, ids: list[int], **options: bool) -> str:
                assert options["skip_special_tokens"]
                return "".join(map(chr, ids))

        assert decoder(Letters())([97, 98]) == "ab"
        assert decoder(None)([97]) == ""


def _first_stop(text: str, stops: list[str]) -> int | None:
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


class TestStops:
    def test_any_text_and_any_stops(self, tokenizer: Any, decode: Decode) -> None:
        """The text ends before the first stop string to be complete, its tokens right behind."""

        @settings(max_examples=500, deadline=None)
        @given(TEXTS, st.lists(TEXTS.filter(bool).map(lambda s: s[:4]), min_size=1, max_size=3))
        def check(text: str, stops: list[str]) -> None:
            tokens = tokenizer.encode(text)
            reader = TextReader(decode, tuple(stops))
            pieces = _read(reader, tokens)
            assert reader.stopped == (_first_stop(text, stops) is not None)
            if not reader.stopped:
                assert "".join(pieces) == text
                return
            assert "".join(pieces) == reader.text
            assert text.startswith(reader.text)
            used = decode(tokens[: reader.num_tokens])
            assert any(used.startswith(reader.text + stop) for stop in stops)
            before = decode(tokens[: reader.num_tokens - 1]).rstrip("\ufffd")
            assert all(stop not in before for stop in stops)

        check()

    @pytest.mark.parametrize(
        ("text", "stops", "expected"),
        [
            pytest.param("one two three", ["o t"], "one tw", id="over-token-borders"),
            pytest.param("one two", ["one"], "", id="at-the-first-token"),
            pytest.param("na\u00efve caf\u00e9", ["\u00e9"], "na\u00efve caf", id="multi-byte"),
            pytest.param("x\U0001f600y", ["\U0001f600"], "x", id="four-bytes"),
            pytest.param("a b c", ["c", "b"], "a ", id="several"),
            pytest.param("a bc", ["c", "bc"], "a ", id="ending-together"),
            pytest.param("abc", ["abcd", "d"], "abc", id="none"),
            pytest.param("\n\n\n", ["\n\n"], "", id="newlines"),
        ],
    )
    def test_cases(
        self, tokenizer: Any, decode: Decode, text: str, stops: list[str], expected: str
    ) -> None:
        reader = TextReader(decode, tuple(stops))
        pieces = _read(reader, tokenizer.encode(text))
        assert ("".join(pieces), reader.text) == (expected, expected)

    def test_what_may_become_a_stop_is_held_back(self, decode: Decode, tokenizer: Any) -> None:
        tokens = [t for piece in ("a", "b", "c", "a", "b", "d") for t in tokenizer.encode(piece)]
        assert _read(TextReader(decode, ("abd",)), tokens) == ["", "", "abc", "", "", ""]

    def test_min_tokens(self, decode: Decode, tokenizer: Any) -> None:
        tokens = [t for piece in ("a", "b", "a", "b", "c") for t in tokenizer.encode(piece)]
        for min_tokens, expected in ((0, ""), (1, ""), (2, "ab"), (3, "ab"), (4, "ababc")):
            reader = TextReader(decode, ("ab",), min_tokens)
            _read(reader, tokens)
            assert reader.text == expected
            assert reader.stopped == (min_tokens < 4)


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("min_tokens", range(1, 40))
def test_min_tokens_of_a_long_output(min_tokens: int, grows: bool) -> None:
    """A long text is not decoded with each token, but the text of the first tokens is."""
    letters = Decoder(lambda ids: "".join(map(chr, ids)), grows=grows)
    for place, stopped in ((min_tokens - 1, False), (min_tokens, True)):
        output = [ord("a")] * 60
        output[place] = ord("b")
        reader = TextReader(letters, ("b",), min_tokens)
        for end in range(1, len(output) + 1):
            reader.read(output[:end], ended=end == len(output))
        assert reader.stopped is stopped
        assert reader.text == ("a" * place if stopped else "".join(map(chr, output)))


def test_reading_costs_little(decode: Decode) -> None:
    """A token takes a fixed number of short decodings, however long the output is."""
    sizes: list[int] = []

    def counted(ids: list[int]) -> str:
        sizes.append(len(ids))
        return decode(ids)

    made: Callable[[list[int]], str] = counted
    reader = TextReader(made)
    tokens = list(range(300, 800))
    _read(reader, tokens)
    assert len(sizes) <= 2 * len(tokens) + 1
    assert max(sizes) <= 8


class Counted(list[int]):
    """Token ids that count how many of them are read or copied."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(tokens)
        self.read = 0

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        self.read += len(found) if isinstance(found, list) else 1
        return found


@pytest.mark.parametrize("stop", [(), ("zz",)])
@pytest.mark.parametrize("size", [1, 3])
def test_each_token_is_read_once(decode: Decode, stop: tuple[str, ...], size: int) -> None:
    prompt = [300] * 50
    tokens = Counted(prompt)
    reader = TextReader(decode, stop, prompt=prompt)
    for start in range(300, 900, size):
        tokens.extend(range(start, start + size))
        reader.read(tokens, ended=False, start=len(prompt))
    assert tokens.read == reader.num_tokens == 600


class _Parts(list[str]):
    """Parts of a text that count how many characters are copied when parts become one."""

    copied = 0

    def __setitem__(self, at: Any, new: Any) -> None:
        self.copied += sum(map(len, new))
        super().__setitem__(at, new)


def test_the_text_is_kept_in_few_parts(decode: Decode) -> None:
    """And a character is copied a few times, not once for each token after it."""
    reader, tokens, told = TextReader(decode), list(range(300, 1300)), ""
    reader._parts = parts = _Parts()
    for end in range(1, len(tokens) + 1):
        before = reader.num_chars
        reader.read(tokens[:end], ended=end == len(tokens))
        sizes = [len(part) for part in reader._parts]
        assert all(a > 2 * b for a, b in pairwise(sizes))
        told += reader.since(before)
    assert told == reader.text == decode(tokens)
    assert parts.copied <= len(told) * len(told).bit_length()
    for start in (0, 1, 500, len(told) - 1, len(told), len(told) + 1):
        assert reader.since(start) == told[start:]
