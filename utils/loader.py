"""Loads a checkpoint's weights. If the ranks split a tensor, each rank loads only its slice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.errors import WeightsError
from utils.files import check_file, read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Names of two tensors that are equal in a model that ties its head to its embedding.
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Old checkpoints store rotary frequencies under names with this ending. They are not loaded.
_DERIVED = ".rotary_emb.inv_freq"
_LISTED = 8
# Dtypes that can be loaded. Quantised checkpoints have other dtypes and are not supported.
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """Where to copy a tensor of the checkpoint, and which slice of the tensor this rank copies."""

    target: Tensor  # view of a parameter; the slice is copied to it (broadcast if necessary)
    shape: tuple[int, ...]  # full shape of the checkpoint's tensor
    dim: int | None = None  # dimension that is split over the ranks; None if no dimension is split
    start: int = 0  # first index, along `dim`, of this rank's slice
    length: int = 0  # number of indices, along `dim`, of this rank's slice
    # (start, length) of further slices, which follow the first one in `target`.
    more: tuple[tuple[int, int], ...] = ()


def load_weights(path: Path, slots: Mapping[str, WeightTarget], *, tied: bool) -> None:
    """Load all tensors in the weight files of a checkpoint folder.

    Like transformers, this reads model.safetensors. If there is no such file, it reads the shards
    that model.safetensors.index.json names. Other files are never read.

    Raises a WeightsError if files are missing or damaged, if tensors are missing or unexpected, or
    if a tensor has a dtype that is not supported, or a shape other than its WeightTarget's `shape`.

    Args:
        slots: a dict from the name of each tensor in the checkpoint to its WeightTarget.
        tied: whether the output head uses the embedding's weight. If True, the files may store the
            weight under the head's name, the embedding's name, or both names if both are equal.
    """
    with ExitStack() as stack:
        stored: dict[str, Any] = {}
        for file in _weight_files(path):
            check_file(file, WeightsError)
            try:
                reader = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file} is not a readable safetensors file: {error}") from error
            for name in reader.keys():  # noqa: SIM118 (the reader is not iterable)
                if name in stored:
                    raise WeightsError(f"{name} is stored twice, the second time in {file}")
                stored[name] = reader.get_slice(name)
        stored = {name: one for name, one in stored.items() if not name.endswith(_DERIVED)}
        head = stored.pop(_HEAD, None) if tied else None
        if head is not None:
            stored.setdefault(_EMBEDDING, head)
        _check(path, slots, stored)
        for name, slot in slots.items():
            slot.target.copy_(_slice(slot, stored[name]))
        if head is not None:
            _check_tied(path, slots[_EMBEDDING], stored[_EMBEDDING], head)


def _weight_files(path: Path) -> list[Path]:
    try:
        present = set(os.listdir(path))
    except OSError as error:
        raise WeightsError(f"{path} cannot be listed: {error}") from error
    if _SINGLE in present:
        return [path / _SINGLE]
    if _INDEX not in present:
        others = _listed(sorted(name for name in present if name.endswith(".safetensors")))
        problem = f"{path} has neither {_SINGLE} nor {_INDEX}"
        if others:
            fix = f"Rename the file with all weights to {_SINGLE}, or add the shards' index."
            raise WeightsError(f"{problem}. It has {others}. {fix}")
        raise WeightsError(f"{problem}. Convert the weights: other formats are not read.")
    weight_map = read_json(path / _INDEX, WeightsError).get("weight_map")
    entries = weight_map.values() if isinstance(weight_map, dict) else ()
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise WeightsError(f"{path / _INDEX} is unusable: weight_map must name each tensor's file")
    shards = set(entries)
    # `present` has only plain names. So paths that leave the folder, e.g. "../x", are missing too.
    if missing := sorted(shards - present):
        fix = "Copy them into the folder."
        raise WeightsError(f"{path} lacks the shards {_listed(missing)} named in its index. {fix}")
    return [path / name for name in sorted(shards)]


def _check(path: Path, slots: Mapping[str, WeightTarget], found: Mapping[str, Any]) -> None:
    misshapen, other = [], []
    for name in sorted(slots.keys() & found.keys()):
        stored, expected = found[name], slots[name].shape
        if tuple(stored.get_shape()) != expected:
            misshapen.append(f"{name} is {stored.get_shape()}, expected {list(expected)}")
        if stored.get_dtype() not in _DTYPES:
            other.append(f"{name} is {stored.get_dtype()}")
    wrong = {
        "missing": sorted(slots.keys() - found.keys()),
        "unexpected": sorted(found.keys() - slots.keys()),
        "misshapen": misshapen,
        f"of another type than {', '.join(_DTYPES)}": other,
    }
    problems = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in wrong.items() if names]
    if problems:
        raise WeightsError(f"the weights in {path} do not fit its config; " + "; ".join(problems))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _slice(slot: WeightTarget, stored: Any) -> Tensor:
    if slot.dim is None:
        return stored[:]  # type: ignore[no-any-return]
    before: tuple[Any, ...] = (slice(None),) * slot.dim
    ranges = ((slot.start, slot.length), *slot.more)
    taken = [(*before, slice(start, start + length)) for start, length in ranges]
    parts = [stored[one] for one in taken]
    return parts[0] if len(parts) == 1 else torch.cat(parts, slot.dim)


def _check_tied(path: Path, slot: WeightTarget, embedding: Any, head: Any) -> None:
    fits = head.get_shape() == embedding.get_shape() and head.get_dtype() in _DTYPES
    # Only this rank's slices are compared: the other ranks compare the others.
    ours, theirs = _slice(slot, embedding), _slice(slot, head) if fits else None
    if theirs is None or not ((ours == theirs) | (ours.isnan() & theirs.isnan())).all():
        raise WeightsError(
            f"{path} ties head and embedding (tie_word_embeddings) but stores an {_HEAD} "
            f"that differs from {_EMBEDDING}"
        )
