"""Decodes token ids to text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

# A function that decodes token ids to text and leaves out special tokens.
Decode = Callable[[list[int]], str]

# Decoding gives this character for invalid bytes, and for the bytes of an incomplete character.
REPLACEMENT = "\ufffd"

# Sequences of the decoders of the library `tokenizers` for which a token's text depends only on the
# token before, on whether the token is the first or the last one, and on `Decoder.is_part`.
_LOCAL = re.compile(
    r"(ByteLevel |WordPiece |CTC |BPEDecoder "
    r"|(Replace )*(ByteFallback )?((Replace|Metaspace|Strip) )*)(Fuse )?(Strip )*"
)
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes token ids to text without special tokens, and knows what later tokens can change.

    Attributes:
        decode: function that decodes token ids to text.
        specials: the text of each special token, by token id.
        is_part: whether tokens after this token may change its text, as in a run of bytes.
        grows: False if later tokens may change any text before them.
    """

    decode: Decode
    specials: Mapping[int, str] = field(default_factory=dict)
    is_part: Callable[[int], bool] = lambda token: False
    grows: bool = True

    def __call__(self, token_ids: list[int]) -> str:
        return self.decode(token_ids)

    @property
    def has_text(self) -> bool:
        """False if every text is empty."""
        return self.decode is not _no_text

    def context(self, prompt: Sequence[int]) -> list[int]:
        """Return the end of `prompt` that is decoded with the output.

        The end begins with the last token that has a text. Special tokens and tokens with parts of
        characters are left out.
        """
        context: list[int] = []
        if self.decode is _no_text:
            return context
        for token in reversed(prompt):
            own = "" if token in self.specials else self.decode([token])
            # A part of a character in the prompt must not join with bytes of the output.
            if not (REPLACEMENT in own or token in self.specials or self.is_part(token)):
                context.append(token)
            if own and context:
                break
        return context[::-1]

    def added(self, prompt: Sequence[int], tokens: list[int]) -> str:
        """Return the text that a whole output adds to the text of its prompt."""
        context = self.context(prompt)
        output = [t for t in tokens if t not in self.specials] if self.specials else tokens
        text, known = self.decode(context + output), self.decode(context)
        # A decoder that changes the end of the context decodes the output apart from it.
        return text[len(known) :] if text.startswith(known) else self.decode(output)


def _no_text(token_ids: list[int]) -> str:
    return ""


def decoder(tokenizer: Any | None, *, skip_special_tokens: bool = True) -> Decoder:
    """Return the tokenizer's decoder. Without a tokenizer the text is empty.

    If `skip_special_tokens` is False, the text has the names of special tokens.
    """
    if tokenizer is None:
        return Decoder(_no_text)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids, names = (getattr(tokenizer, f"all_special_{kind}", ()) for kind in ("ids", "tokens"))
        options = {"skip_special_tokens": skip_special_tokens}
        decode = partial(tokenizer.decode, **options, clean_up_tokenization_spaces=False)
        specials = dict(zip(ids, names, strict=True)) if skip_special_tokens else {}
        return Decoder(decode, specials, grows=False)
    added = backend.get_added_tokens_decoder().items() if skip_special_tokens else ()
    specials = {token: one.content for token, one in added if one.special}
    # `backend.decode` takes 0.8 us for a few tokens, 1/16 of the time of `tokenizer.decode`.
    decode = partial(backend.decode, skip_special_tokens=skip_special_tokens)
    try:
        spec = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"decoders": []}
    except Exception:  # a decoder written in Python raises plain `Exception`
        return Decoder(decode, specials, grows=False)
    steps = spec.get("decoders", [spec])
    kinds = [step["type"] for step in steps]
    grows = _LOCAL.fullmatch("".join(f"{kind} " for kind in kinds)) is not None
    if "BPEDecoder" not in kinds and "ByteFallback" not in kinds:
        return Decoder(decode, specials, grows=grows)
    suffix = steps[0].get("suffix")

    def is_part(token: int) -> bool:
        # A token without text ends nothing.
        piece = backend.id_to_token(token)
        if not piece:
            return True
        # One invalid byte turns the whole run of bytes into U+FFFD. A suffix becomes a space once a
        # further token follows. At the end of the output, a suffix has no text.
        return bool(
            _BYTE.fullmatch(piece) if suffix is None else suffix in piece.removesuffix(suffix)
        )

    return Decoder(decode, specials, is_part, grows)
