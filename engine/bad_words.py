"""Bad words: texts that an output must not contain, as token ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sampling_params import SamplingParams
from utils.errors import RequestError


def with_bad_words_ids(params: SamplingParams, tokenizer: Any | None) -> SamplingParams:
    """Return `params` with `bad_words_ids` in place of `bad_words`.

    Each word is encoded alone and after a space, because many tokenizers have other tokens for the
    beginning of a word. A RequestError is raised if a word cannot be encoded, or has too many
    tokens.
    """
    words = params.bad_words
    if not words:
        return params
    if tokenizer is None:
        fix = "Use bad_words_ids, or add the tokenizer's files to the folder."
        raise RequestError("bad_words", words, "the checkpoint has no tokenizer", fix)
    found = [list(ids) for ids in params.bad_words_ids]
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            try:
                ids = list(tokenizer.encode(text, add_special_tokens=False))
            except Exception as error:  # a tokenizer may raise any exception
                problem = f"the tokenizer refuses it ({error})"
                raise RequestError("bad_words", word, problem, "Give valid Unicode.") from error
            if not ids:
                raise RequestError("bad_words", word, "has no tokens", "Leave it out.")
            if ids not in found:
                found.append(ids)
    try:
        return replace(params, bad_words=None, bad_words_ids=found)
    except RequestError as error:
        problem, fix = "they have too many tokens", "Give fewer or shorter words."
        raise RequestError("bad_words", words, problem, fix) from error
