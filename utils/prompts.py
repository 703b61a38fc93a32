"""Loads the tokenizer, and converts prompts and conversations to token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from utils.errors import CheckpointError, RequestError
from utils.files import check_file

Prompt = str | list[int]
Prompts = Prompt | list[str] | list[list[int]] | list[Prompt]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def load_tokenizer(path: Path) -> Any | None:
    """Return the folder's tokenizer, or None if there is none. CheckpointError: loading fails."""
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
    except Exception as error:  # a tokenizer may raise any exception
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
