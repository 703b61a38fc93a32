"""Loads the tokenizer, and converts prompts to token ids. `utils.chats` converts conversations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from utils.errors import CheckpointError, RequestError
from utils.files import check_file
from utils.rules import plain


class TokenArray(Protocol):
    """An array of token ids: of NumPy, torch, or any library whose arrays have this method."""

    def tolist(self) -> Any: ...


Prompt = str | Sequence[int] | Mapping[str, Any] | TokenArray
Prompts = Prompt | Sequence[Prompt]


class TokenizedPrompt(NamedTuple):
    """The token ids of a prompt, and its text. The text is None if only token ids were given."""

    token_ids: list[int]
    text: str | None


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
# Keys of a dictionary that is a prompt: those of vLLM, then those of transformers' tokenizers.
_KEYS = ("prompt", "prompt_token_ids", "input_ids", "attention_mask", "token_type_ids")
_KEY_FIXES = {
    "cache_salt": "Use SamplingParams(cache_salt=...).",
    "multi_modal_data": "This engine runs models of text alone.",
    "prompt_embeds": "Give token ids.",
}


def load_tokenizer(path: Path) -> Any | None:
    """Return the tokenizer in a folder, or None. Raises a CheckpointError if loading fails."""
    # Imported here: the import takes seconds, and most tensor-parallel ranks need no tokenizer.
    from transformers import AutoTokenizer

    if not any(os.path.lexists(path / name) for name in TOKENIZER_FILES):
        return None
    for name in (*TOKENIZER_FILES, "merges.txt", "chat_template.jinja"):
        if os.path.lexists(path / name):
            check_file(path / name, CheckpointError)
    try:
        return AutoTokenizer.from_pretrained(path)
    # `from_pretrained` raises many types of errors, also plain `Exception`. All are caught.
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {path} is unusable: {error}") from error


def tokenized(tokenizer: Any | None, prompts: Prompts) -> list[TokenizedPrompt]:
    """Return the token ids of each prompt. Raises a RequestError if a prompt is wrong."""
    return [_tokenized(tokenizer, prompt) for prompt in _separate(prompts)]


def as_list(prompt: Any) -> Any:
    """Return a list of this one prompt. A number is no prompt, so a number is returned as it is."""
    return prompt if _is_number(prompt) else [prompt]


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or getattr(value, "ndim", None) == 0


def _separate(prompts: Any) -> Sequence[Any]:
    """Return a list of one or several prompts as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        text, ids = _entries(prompts)
        # The text belongs to all ids together.
        return [prompts] if ids is None or text is not None else _separate(ids) or [[]]
    values = _listed(prompts)
    if not isinstance(values, (list, tuple)):
        problem, fix = "is no list of prompts", "Give a list of texts or token ids."
        raise RequestError("prompts", prompts, problem, fix)
    # An empty list has no prompts, but an empty array is an empty prompt.
    one = _is_number(values[0]) if values else values is not prompts
    return [values] if one else values


def _listed(values: Any) -> Any:
    """Return an array as a list, and anything else as it is."""
    try:
        return values if isinstance(values, (str, list, tuple)) else plain(values)
    except Exception as error:  # an array without data, for example on torch's device "meta"
        problem = f"its values cannot be read ({error})"
        raise RequestError("prompt", values, problem, "Give a list of int.") from error


def _entries(prompt: Mapping[str, Any]) -> tuple[str | None, Any | None]:
    """Return the text and the token ids of a dictionary. One of the two may be None."""
    for key in prompt:
        if key not in _KEYS:
            known = f"Known: {', '.join(_KEYS)}."
            fix = _KEY_FIXES.get(key, known) if isinstance(key, str) else known
            raise RequestError("prompt", key, "is no key of a prompt here", fix)
    text, ids, inputs = (prompt.get(key) for key in _KEYS[:3])
    if not isinstance(text, (str, type(None))):
        raise RequestError("prompt", text, "is no text", "Give token ids as prompt_token_ids.")
    if ids is not None and inputs is not None:
        fix = "Leave out prompt_token_ids or input_ids."
        raise RequestError("prompt", prompt, "has token ids twice", fix)
    if inputs is not None:
        ids = _without_padding(_listed(inputs), _listed(prompt.get("attention_mask")))
    if ids is None and text is None:
        fix = "Give prompt or prompt_token_ids."
        raise RequestError("prompt", prompt, "has neither text nor token ids", fix)
    for one in [ids, *(ids if isinstance(ids, (list, tuple)) else ())]:
        if isinstance(one, (str, Mapping)):
            raise RequestError("prompt", one, "is no token id", "Give token ids as a list of int.")
    return text, ids


def _without_padding(ids: Any, mask: Any) -> Any:
    """Return the token ids at which the attention mask is not 0, in rows as before."""
    if mask is None or ids is None:
        return ids
    try:
        pairs = list(zip(map(_listed, ids), map(_listed, mask), strict=True))
        if any(isinstance(row, (list, tuple)) for row, _ in pairs):
            return [_without_padding(*pair) for pair in pairs]
        return [token for token, used in pairs if used]
    except (TypeError, ValueError) as error:
        fix = "Leave it out if there is no padding."
        raise RequestError(
            "attention_mask", mask, "has another shape than input_ids", fix
        ) from error


def _tokenized(tokenizer: Any | None, prompt: Any) -> TokenizedPrompt:
    text: str | None = None
    ids: Any = None
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Mapping):
        text, ids = _entries(prompt)
    else:
        ids = prompt
    if text is not None and ids is None:
        return TokenizedPrompt(_encoded(tokenizer, text), text)
    return TokenizedPrompt(_ids(_listed(ids), prompt), text)


def _ids(ids: Any, prompt: Any) -> list[int]:
    """Return token ids as a list. `check_request` later refuses elements that are no token ids."""
    # Tokenizers return one prompt as a row of a table if they are asked for tensors.
    if isinstance(ids, (list, tuple)) and len(ids) == 1:
        row = _listed(ids[0])
        ids = row if isinstance(row, (list, tuple)) else ids
    if not isinstance(ids, (list, tuple)):
        fix = "Give a str or a list of int."
        raise RequestError("prompt", prompt, "is neither text nor token ids", fix)
    return list(plain(ids))


def _encoded(tokenizer: Any | None, text: str) -> list[int]:
    if tokenizer is None:
        fix = "Give token ids, or add the tokenizer's files to the folder."
        raise RequestError("prompt", text, "the checkpoint has no tokenizer", fix)
    try:
        return list(tokenizer.encode(text))
    except Exception as error:  # a tokenizer may raise any exception
        problem = f"the tokenizer refuses it ({error})"
        raise RequestError("prompt", text, problem, "Give valid Unicode.") from error
