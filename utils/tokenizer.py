"""A checkpoint's tokenizer. Ranks import none of this: transformers' part of it takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from utils.errors import CheckpointError

# A checkpoint folder with one of these has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer, or None if the folder has none (prompts must then be token ids).

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    # It raises many unrelated types, Exception itself among them.
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {path} is unusable: {error}") from error
