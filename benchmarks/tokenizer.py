"""Tokenizers for checkpoints that have none, such as those with random weights."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.prompts import TOKENIZER_FILES

if TYPE_CHECKING:
    from tokenizers.models import Model

# Shares of a vocabulary made here: words, often after a space, as most entries of published
# byte-level vocabularies are; whole characters of other scripts; the rest are parts of characters.
_WORDS, _CHARACTERS = 0.82, 0.15


def with_tokenizer(model: Path, folder: Path, vocab_size: int | None = None) -> str:
    """The checkpoint, or links to it in `folder` beside a tokenizer made on the spot.

    Args:
        vocab_size: distinct texts that the tokenizer knows, as `byte_entries`. None makes one that
            knows no word, for engines that only cannot start without.
    """
    if any((model / name).exists() for name in TOKENIZER_FILES):
        return str(model)
    import tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    if vocab_size is None:
        _save(tokenizers.models.WordLevel({"?": 0}, unk_token="?"), folder, "?")
        return str(folder)
    letters = byte_letters()
    vocab = {
        "".join(letters[byte] for byte in entry): i
        for i, entry in enumerate(byte_entries(vocab_size))
    }
    # Without merges it reads text byte by byte; what it writes is what matters here.
    _save(tokenizers.models.BPE(vocab, []), folder, None)
    return str(folder)


def byte_entries(count: int) -> list[bytes]:
    """Distinct texts of a byte-level vocabulary, always the same: first all single bytes.

    Lengths are like those of published vocabularies, six bytes on average; a few entries are
    parts of characters, which mean something only beside others.

    Raises:
        ValueError: fewer than the 256 bytes.
    """
    if count < 256:
        raise ValueError(f"a byte-level vocabulary has at least 256 entries, not {count}")
    found = dict.fromkeys(bytes([byte]) for byte in range(256))
    texts = _random_texts()
    while len(found) < count:
        found[next(texts)] = None
    return list(found)


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _random_texts() -> Iterator[bytes]:
    rng = random.Random(0)
    while True:
        kind = rng.random()
        if kind < _WORDS:
            word = "".join(rng.choices(string.ascii_letters, k=rng.randint(2, 9)))
            yield (" " * (rng.random() < 0.6) + word).encode()
            continue
        # Cyrillic, two bytes each, or Chinese, three.
        first, last = rng.choice(((0x430, 0x44F), (0x4E00, 0x9FA5)))
        text = "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 3))).encode()
        if kind < _WORDS + _CHARACTERS:
            yield text
        else:
            cut = rng.randint(1, len(text) - 1)
            yield text[:cut] if rng.random() < 0.5 else text[cut:]


def _save(model: Model, folder: Path, special: str | None) -> None:
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(model)
    if special is None:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    names: dict[str, Any] = {"unk_token": special, "eos_token": special} if special else {}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
