"""Converts prompts to token ids. Converts output tokens to text, also while the output grows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from utils.errors import CheckpointError, RequestError

Prompt = str | list[int]
Prompts = Prompt | list[str] | list[list[int]] | list[Prompt]

# A function that decodes token ids to text and leaves out special tokens.
Decode = Callable[[list[int]], str]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")

# Decoding gives this character for invalid bytes, and for the bytes of an incomplete character.
_REPLACEMENT = "\ufffd"


def load_tokenizer(path: Path) -> Any | None:
    """Return the folder's tokenizer, or None if there is none. CheckpointError: loading fails."""
    # Imported here: the import takes seconds, and tensor-parallel ranks need no tokenizer.
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    # `from_pretrained` raises many types of errors, also plain `Exception`. All are caught.
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {path} is unusable: {error}") from error


def tokenized(tokenizer: Any | None, prompts: Prompts) -> list[list[int]]:
    """Return the token ids of each prompt. RequestError: a prompt cannot be converted."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, (list, tuple)):
        problem, fix = "is no list of prompts", "Give a list of texts or token ids."
        raise RequestError("prompts", prompts, problem, fix)
    if prompts and isinstance(prompts[0], int):
        prompts = [prompts]
    return [_tokens(tokenizer, prompt) for prompt in prompts]


def _tokens(tokenizer: Any | None, prompt: Any) -> list[int]:
    if isinstance(prompt, (list, tuple)):
        return list(prompt)
    if not isinstance(prompt, str):
        fix = "Give a str or a list of int."
        raise RequestError("prompt", prompt, "is neither text nor token ids", fix)
    if tokenizer is None:
        fix = "Give token ids, or add the tokenizer's files to the folder."
        raise RequestError("prompt", prompt, "the checkpoint has no tokenizer", fix)
    try:
        return list(tokenizer.encode(prompt))
    except (TypeError, ValueError) as error:
        problem = f"the tokenizer refuses it ({error})"
        raise RequestError("prompt", prompt, problem, "Give valid Unicode.") from error


def templated(tokenizer: Any | None, messages: Any) -> list[int]:
    """Return a conversation's token ids. RequestError: the chat template is missing or fails."""
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        problem = "the checkpoint has no chat template"
        raise RequestError("messages", messages, problem, "Use generate().")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))
    # A chat template is a program in the checkpoint. The program may raise any type of error.
    except Exception as error:
        problem = f"the chat template refuses them ({error})"
        fix = 'Give a list of {"role": ..., "content": ...}.'
        raise RequestError("messages", messages, problem, fix) from error


def decoder(tokenizer: Any | None) -> Decode:
    """Return a function that decodes token ids to text. Without a tokenizer the text is empty."""
    if tokenizer is None:
        return lambda token_ids: ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        # `backend.decode` takes 0.8 us for a few tokens, 1/16 of the time of `tokenizer.decode`.
        return partial(backend.decode, skip_special_tokens=True)
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextReader:
    """Decodes a growing output to text, and finds the first stop string in the text.

    If a character's bytes are in several tokens, the character is added to `text` after the last of
    these tokens is read. Invalid bytes become U+FFFD, which is added with the next valid character
    or at the end of the output. Stop strings within the first `min_tokens` tokens are ignored.
    """

    def __init__(self, decode: Decode, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self._decode, self._stop, self._min_tokens = decode, stop, min_tokens
        self.text = ""  # the text so far, without the stop string
        self.num_tokens = 0  # number of tokens read; tokens after a stop string are never read
        self.stopped = False  # whether a stop string was found
        # A token's text may depend on the token before. So `read` decodes all tokens from index
        # `_start` on together. The decoded text's first `_shown` characters are already in `text`.
        # The tokens before index `_border` end with a whole character. `_start` <= `_border`.
        self._start = self._border = self._shown = 0

    @property
    def settled(self) -> int:
        """Number of leading characters of `text` that cannot become part of a stop string."""
        longest = 0 if self.stopped else max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return len(self.text) - size
        return len(self.text)

    def read(self, token_ids: list[int], *, ended: bool) -> bool:
        """Append to `text` the text of those `token_ids` that are not read yet. Return `stopped`.

        `token_ids` is the whole output. If `ended`, an incomplete last character becomes U+FFFD.
        """
        while self.num_tokens < len(token_ids) and not self.stopped:
            self.num_tokens += 1
            window = self._decode(token_ids[self._start : self.num_tokens])
            whole = window.rstrip(_REPLACEMENT)
            self._append(whole[self._shown :])
            self._shown = max(self._shown, len(whole))
            if len(whole) == len(window):
                self._start, self._border = self._border, self.num_tokens
                self._shown = len(self._decode(token_ids[self._start : self.num_tokens]))
        if ended and not self.stopped:
            window = self._decode(token_ids[self._start : self.num_tokens])
            self._append(window[self._shown :])
            self._shown = len(window)
        return self.stopped

    def _append(self, new: str) -> None:
        if not new:
            return
        before = len(self.text)
        self.text += new
        if not self._stop or self.num_tokens <= self._min_tokens:
            return
        # Find the leftmost of the stop strings that end inside `new`.
        starts = (self.text.find(s, max(0, before + 1 - len(s))) for s in self._stop)
        first = min((at for at in starts if at >= 0), default=None)
        if first is not None:
            self.text, self.stopped = self.text[:first], True
