"""Loads a checkpoint's weights. If the ranks split a tensor, each rank loads only its slice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.errors import WeightsError

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


def load_weights(path: Path, slots: Mapping[str, WeightTarget], *, tied: bool) -> None:
    """Load all tensors in the safetensors files of a checkpoint folder.

    Raises a WeightsError if a file is damaged, if tensors are missing or unexpected, or if a tensor
    has a dtype that is not supported, or a shape other than its WeightTarget's `shape`.

    Args:
        slots: a dict from the name of each tensor in the checkpoint to its WeightTarget.
        tied: whether the output head uses the embedding's weight. If True, and if the files store a
            weight of the head too, that weight must equal the embedding's weight.
    """
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in _weight_files(path):
            try:
                reader = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file} is not a readable safetensors file: {error}") from error
            for name in reader.keys():  # noqa: SIM118 (the reader is not iterable)
                if name in where:
                    raise WeightsError(f"{name} is stored twice, the second time in {file}")
                where[name] = reader
        where = {name: reader for name, reader in where.items() if not name.endswith(_DERIVED)}
        duplicate = where.pop("lm_head.weight", None) if tied else None
        _check(path, slots, where)
        for name, slot in slots.items():
            _fill(slot, where[name].get_slice(name))
        if duplicate is not None:
            _check_tied(path, where, duplicate)


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [path / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{index} is unusable: {error}") from error
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(f"{path} lacks the shards {', '.join(missing)} named in its index")
    if not files:
        raise WeightsError(f"{path} has no *.safetensors file (other formats are not read)")
    return files


def _check(path: Path, slots: Mapping[str, WeightTarget], where: Mapping[str, Any]) -> None:
    misshapen, other = [], []
    for name in sorted(slots.keys() & where.keys()):
        stored, expected = where[name].get_slice(name), slots[name].shape
        if tuple(stored.get_shape()) != expected:
            misshapen.append(f"{name} is {stored.get_shape()}, expected {list(expected)}")
        if stored.get_dtype() not in _DTYPES:
            other.append(f"{name} is {stored.get_dtype()}")
    found = {
        "missing": sorted(slots.keys() - where.keys()),
        "unexpected": sorted(where.keys() - slots.keys()),
        "misshapen": misshapen,
        f"of another type than {', '.join(_DTYPES)}": other,
    }
    problems = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in found.items() if names]
    if problems:
        raise WeightsError(f"the weights in {path} do not fit its config; " + "; ".join(problems))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _fill(slot: WeightTarget, stored: Any) -> None:
    taken: Any = slice(None)
    if slot.dim is not None:
        taken = (slice(None),) * slot.dim + (slice(slot.start, slot.start + slot.length),)
    slot.target.copy_(stored[taken])


def _check_tied(path: Path, where: Mapping[str, Any], head: Any) -> None:
    name = "model.embed_tokens.weight"
    if not torch.equal(where[name].get_tensor(name), head.get_tensor("lm_head.weight")):
        raise WeightsError(
            f"{path} ties head and embedding (tie_word_embeddings) but stores an lm_head.weight "
            f"that differs from {name}"
        )
