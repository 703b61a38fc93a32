"""Text of growing outputs, for the decoders of the library `tokenizers` and for slow tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tokenizer import byte_letters
from llm import LLM, SamplingParams
from tests.utils.plain_stops import stopped_text
from utils.text import Decode, decoder
from utils.text_reader import TextReader

WORDS = ["\u2581a", "\u2581b", "b", "a", "\u2581", "\u2581\u2581", "", "\u00e9", "'s", "\u2581."]
BYTES = [f"<0x{byte:02X}>" for byte in b"\xc3\xa9\xe2\x82\xacA\n\xff"]
PIECES = ["a", "##b", "b", ".", "n't", "##", "do", ",", "' "]
RAW = [b"a", b" b", b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", b" \xe2", b"\x82\xaca", b"\xff"]
SPECIALS = ["<|x|>", "<|y|>"]
SPACES = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
# A kind of decoder: the decoders in their order, and a vocabulary.
KINDS: dict[str, tuple[list[Any], list[str]]] = {
    "byte-level": (["ByteLevel"], ["".join(byte_letters()[b] for b in one) for one in RAW]),
    "metaspace": ([("Metaspace", {})], WORDS),
    "metaspace-never": ([("Metaspace", {"prepend_scheme": "never"})], WORDS),
    "wordpiece": ([("WordPiece", {"cleanup": True})], PIECES),
    "wordpiece-as-is": ([("WordPiece", {"cleanup": False})], PIECES),
    "llama": (["spaces", "ByteFallback", "Fuse", ("Strip", {"left": 1})], WORDS + BYTES),
    "strip-two": (["spaces", "ByteFallback", "Fuse", ("Strip", {"left": 2})], WORDS + BYTES),
    "gemma": (["spaces", "ByteFallback", "Fuse"], WORDS + BYTES),
    "t5": (["ByteFallback", ("Metaspace", {})], WORDS + BYTES),
    "suffix": ([("BPEDecoder", {"suffix": "</w>"})], ["a", "b</w>", "</w>", "a</w>b", "c"]),
    "ctc": (["CTC"], ["a", "b", "|", "<pad>", ".", "'s"]),
    "strip": ([("Strip", {"left": 1})], ["a", " ", "b ", "  a"]),
    "none": ([], ["a", "b", "", " "]),
    "later-tokens-change-all": (["Fuse", ("Replace", ("ab", "X"))], ["c", "a", "b", "ab"]),
}


def _tokenizer(kind: str) -> Any:
    import tokenizers
    import transformers

    steps, words = KINDS[kind]
    made: list[Any] = []
    for step in steps:
        name, options = step if isinstance(step, tuple) else (step, {})
        if name == "spaces":
            name, options = "Replace", ("\u2581", " ")
        make = getattr(tokenizers.decoders, name)
        made.append(make(**options) if isinstance(options, dict) else make(*options))
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[0]))
    if made:
        tokenizer.decoder = made[0] if len(made) == 1 else tokenizers.decoders.Sequence(made)
    tokenizer.add_special_tokens(SPECIALS)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=True
    )


class Slow:
    """A tokenizer in Python, of words of which some go on in the next one, as CTRL's."""

    all_special_ids, all_special_tokens = (4,), ("<|x|>",)

    def decode(self, ids: list[int], **options: bool) -> str:
        assert options["skip_special_tokens"]
        words = ["a", "b@@", "n", "'t", "", "."]
        text = " ".join(words[i % len(words)] for i in ids if i not in self.all_special_ids)
        return text.replace("@@ ", "").replace(" '", "'").replace(" .", ".")


@pytest.fixture(scope="module", params=[*KINDS, "slow"])
def decode(request: pytest.FixtureRequest) -> Decode:
    return decoder(Slow() if request.param == "slow" else _tokenizer(request.param))


# Token 0 is a word of each kind. Ids above the vocabulary have no text.
TOKENS = st.lists(st.integers(0, 24), max_size=14)
STEPS = st.lists(st.integers(1, 5), min_size=1, max_size=5)
STOPS = ["a", "ab", " a", "a b", "\u00e9", "\u20ac", "\n", "b."]


def _expected(decode: Decode, output: list[int]) -> str:
    """What the output adds to the text of the prompt [0]."""
    before, after = decode([0]), decode([0, *output])
    return after[len(before) :] if after.startswith(before) else decode(output)


def _told(reader: TextReader, output: list[int], steps: list[int]) -> list[str]:
    """What a stream tells if so many tokens come at a time, over and over."""
    parts, told, end, turn = [], 0, 0, 0
    while end < len(output) and not reader.stopped:
        end, turn = min(len(output), end + steps[turn % len(steps)]), turn + 1
        reader.read(output[:end], ended=end == len(output))
        until = len(reader.text) if end == len(output) else reader.settled
        parts.append(reader.text[told:until])
        told = until
    return parts


def test_parts_make_the_text_of_the_whole_output(decode: Decode) -> None:
    @settings(max_examples=200, deadline=None)
    @given(TOKENS, STEPS)
    def check(output: list[int], steps: list[int]) -> None:
        expected = _expected(decode, output)
        reader = TextReader(decode, prompt=[0])
        assert "".join(_told(reader, output, steps)) == expected
        at_once = TextReader(decode, prompt=[0])
        at_once.read(output, ended=True)
        assert at_once.text == expected

    check()


def test_stop_strings(decode: Decode) -> None:
    @settings(max_examples=300, deadline=None)
    @given(TOKENS, STEPS, st.lists(st.sampled_from(STOPS), min_size=1, max_size=2))
    def check(output: list[int], steps: list[int], stops: list[str]) -> None:
        reader = TextReader(decode, tuple(stops), prompt=[0])
        parts = "".join(_told(reader, output, steps))
        text = _expected(decode, output[: reader.num_tokens])
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        assert reader.stopped == bool(found)
        assert parts == (text[: min(found)] if found else text)
        one = TextReader(decode, tuple(stops), prompt=[0])
        _told(one, output, [1])
        assert (one.text, one.num_tokens) == (reader.text, reader.num_tokens)

    check()


def test_stop_strings_that_name_special_tokens_and_are_ignored(decode: Any) -> None:
    """Beside a search of the whole text after every token."""
    stops = ["a", "ab", " a", "a b", "b.", "<|x|>", "a<|x|>", "<|x|> b", "<|x|><|y|>", "b<|y|>a"]
    compared = 0

    @settings(max_examples=150, deadline=None)
    @given(TOKENS, STEPS, st.lists(st.sampled_from(stops), min_size=1, max_size=3), st.data())
    def check(output: list[int], steps: list[int], stops: list[str], data: Any) -> None:
        nonlocal compared
        special = st.sampled_from([None, None, *decode.specials])
        drawn = [data.draw(special) for _ in output]
        output = [new if old is None else old for new, old in zip(output, drawn, strict=True)]
        texts = [_expected(decode, output[:count]) for count in range(len(output) + 1)]
        later = any(not b.startswith(a) for a, b in pairwise(texts))
        if later or "\ufffd" in "".join(texts):
            return  # then it is not known which token a character is from
        compared += 1
        min_tokens = data.draw(st.integers(0, 4))
        expected = stopped_text(texts, output, stops, decode.specials, min_tokens)
        reader = TextReader(decode, tuple(stops), min_tokens, prompt=[0])
        parts = "".join(_told(reader, output, steps))
        assert (reader.text, reader.num_tokens, reader.stop_string) == expected
        assert parts == reader.text
        whole = TextReader(decode, tuple(stops), min_tokens, prompt=[0], includes_stop=True)
        parts = "".join(_told(whole, output, steps))
        assert parts == whole.text == reader.text + (reader.stop_string or "")

    check()
    assert compared > 15


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "wordpiece", "llama", "suffix"])
def test_text_comes_with_its_token(kind: str) -> None:
    output = [0, 1, 0, 1]
    parts = _told(TextReader(decoder(_tokenizer(kind)), prompt=[0]), output, [1])
    assert all(parts)


class TestTheFirstSpace:
    @pytest.mark.parametrize("kind", ["metaspace", "llama", "gemma"])
    def test_is_kept_behind_a_prompt(self, kind: str) -> None:
        decode = decoder(_tokenizer(kind))
        newline = [len(WORDS) + 6] if kind == "llama" else []
        for prompt in ([0], [0, len(WORDS)], [0, 4], [0, *newline]):
            reader = TextReader(decode, prompt=prompt)
            reader.read([1, 2], ended=True)
            assert reader.text == " bb"
        assert decode([1, 2]) == ("b" if kind != "gemma" else " b") + "b"

    def test_is_not_there_behind_special_tokens_alone(self) -> None:
        tokenizer = _tokenizer("llama")
        start = tokenizer.convert_tokens_to_ids("<|x|>")
        reader = TextReader(decoder(tokenizer), prompt=[start, start])
        assert _told(reader, [start, 1, start, 1], [1]) == ["", "b", "", " b"]


class TestSpecialTokens:
    @pytest.mark.parametrize(
        ("output", "stops", "expected", "num_tokens"),
        [
            pytest.param("aXb", ["<|x|>"], " a", 2, id="alone"),
            pytest.param("abXb", ["b<|x|>"], " a ", 3, id="behind-text"),
            pytest.param("abXYb", ["<|x|><|y|>"], " a b", 4, id="two"),
            pytest.param("aXba", ["<|x|> b"], " a", 3, id="before-text"),
            pytest.param("aYbXa", ["<|x|>"], " a b", 4, id="another-one-before"),
            pytest.param("aXb", ["<|x|>a"], " a b", 3, id="not-the-whole"),
            pytest.param("aYYXb", ["<|x|>"], " a", 4, id="behind-tokens-without-text"),
            pytest.param("aXb", ["a b"], " ", 3, id="skipped-in-text"),
            pytest.param("aXb", ["<|x|>a", "a b"], " ", 3, id="skipped-though-named"),
            pytest.param("anX", ["\n<|x|>"], " a", 3, id="behind-a-byte"),
            pytest.param("aeX", ["<|x|>"], " a\ufffd", 3, id="behind-a-part"),
            pytest.param("anXn", ["<|x|>\n"], " a\n", 4, id="between-bytes"),
        ],
    )
    def test_stop(self, output: str, stops: list[str], expected: str, num_tokens: int) -> None:
        size = len(WORDS)
        ids = {"a": 0, "b": 1, "n": size + 6, "e": size, "X": size + 8, "Y": size + 9}
        tokens = [ids[one] for one in output]
        for steps in ([1], [2], [5]):
            reader = TextReader(decoder(_tokenizer("llama")), tuple(stops), prompt=[0])
            parts = _told(reader, tokens, steps)
            assert "".join(parts) == reader.text == expected
            assert reader.num_tokens == num_tokens

    def test_min_tokens(self) -> None:
        decode, special = decoder(_tokenizer("llama")), len(WORDS) + 8
        for min_tokens, expected in ((0, ""), (1, " a"), (2, " a"), (3, " a a")):
            reader = TextReader(decode, ("<|x|>",), min_tokens, prompt=[0])
            _told(reader, [special, 0, special, 0], [1])
            assert (reader.text, reader.stopped) == (expected, min_tokens < 3)

    def test_what_may_become_a_stop_string_is_held_back(self) -> None:
        reader = TextReader(decoder(_tokenizer("llama")), (" a<|x|> b",), prompt=[0])
        special = len(WORDS) + 8
        assert _told(reader, [0, special, 0, special, 3, 3], [1]) == [
            *("", "", " a", "", " aa", "a"),
        ]


@pytest.mark.parametrize("stop", [(), ("zz",), ("zz<|x|>",)])
@pytest.mark.parametrize(
    ("kind", "token"),
    [
        pytest.param("byte-level", 9, id="invalid-bytes"),
        pytest.param("byte-level", 10, id="special-tokens"),
        pytest.param("byte-level", 99, id="ids-without-a-token"),
        pytest.param("llama", len(WORDS) + 7, id="invalid-byte-tokens"),
        pytest.param("llama", len(WORDS) + 5, id="a-long-run-of-bytes"),
        pytest.param("llama", 6, id="tokens-without-text"),
        pytest.param("llama", 99, id="ids-without-a-token-in-llama"),
        pytest.param("ctc", 3, id="padding"),
        pytest.param("suffix", 3, id="suffixes-inside"),
        pytest.param("later-tokens-change-all", 2, id="text-that-may-change"),
    ],
)
def test_the_decoded_tokens_grow_linearly(kind: str, token: int, stop: tuple[str, ...]) -> None:
    made, count = decoder(_tokenizer(kind)), 0

    def counted(ids: list[int]) -> str:
        nonlocal count
        count += len(ids)
        return made.decode(ids)

    output = [token] * 3000 + [0] * 500
    reader = TextReader(replace(made, decode=counted), stop, prompt=[0])
    for end in range(1, len(output) + 1):
        reader.read(output[:end], ended=end == len(output))
    assert reader.text == _expected(made, output)
    assert count <= 12 * len(output)


def _below(size: int) -> Callable[[list[int], Any], Any]:
    """A logits processor that allows all ids below `size`, with equal probabilities."""

    def process(token_ids: list[int], logits: Any) -> Any:
        logits = logits * 0
        logits[size:] = -float("inf")
        return logits

    return process


class TestStreams:
    @pytest.fixture(scope="class")
    def llm(self, shipped: Path) -> Iterator[LLM]:
        with LLM(shipped, device="cpu", max_num_seqs=8) as llm:
            yield llm

    @pytest.mark.parametrize("kind", ["metaspace", "wordpiece", "llama", "suffix", "ctc", "none"])
    def test_tell_what_generate_returns(self, llm: LLM, kind: str) -> None:
        size = len(KINDS[kind][1]) + len(SPECIALS)
        llm.tokenizer = _tokenizer(kind)
        llm.decode = decoder(llm.tokenizer)
        params = [
            SamplingParams(
                max_tokens=20, seed=i, ignore_eos=True, stop=stop, logits_processors=[_below(size)]
            )
            for i, stop in enumerate([(), (), (), ("a a",), ("<|x|>",)])
        ]
        outputs = llm.generate([[0]] * len(params), params, use_tqdm=False)
        texts = [""] * len(params)
        for part in llm.stream([[0]] * len(params), params):
            texts[part["index"]] += part["text"]
        assert texts == [out["text"] for out in outputs]
        assert texts[:3] == [_expected(llm.decode, out["token_ids"]) for out in outputs[:3]]
