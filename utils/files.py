"""Reads the files of a checkpoint folder. The errors name the file, the problem and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.errors import CheckpointError

# Git LFS stores large files outside of git. Without git-lfs, a clone has a text file that begins
# with these bytes in place of each large file.
_POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(file: Path, error: type[CheckpointError]) -> None:
    """Raise `error` if a file cannot be opened, or is a Git LFS pointer in place of the file."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError as cause:
        raise error(f"{file} cannot be opened: {cause}. Copy it again.") from cause
    if start == _POINTER:
        fix = "Run `git lfs pull` in its folder."
        raise error(f"{file} is a Git LFS pointer, not the file itself. {fix}")


def read_json(file: Path, error: type[CheckpointError]) -> dict[str, Any]:
    """Return the JSON object in a UTF-8 file. Raises `error` if there is none."""
    check_file(file, error)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    # RecursionError: the text has thousands of nested brackets.
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{file} is unusable: no JSON text in UTF-8 ({cause})") from cause
    if not isinstance(fields, dict):
        raise error(f"{file} is unusable: a {type(fields).__name__}, not a JSON object")
    return fields
