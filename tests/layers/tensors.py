"""Tensors in a checkpoint's place, a place for layers, and the plain norm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from layers.parallel import ParallelContext, Place
from utils.loader import WeightTarget, load_weights

CPU = torch.device("cpu")


def place(parallel: ParallelContext | None = None, dtype: torch.dtype = torch.float32) -> Place:
    """On the CPU, by default alone."""
    return Place(parallel or ParallelContext(), dtype, CPU)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of random float32 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def load(folder: Path, tensors: dict[str, Tensor], slots: Mapping[str, WeightTarget]) -> None:
    """Fill slots as from a checkpoint that holds these tensors and nothing else."""
    if not (folder / "model.safetensors").exists():
        save_file(tensors, folder / "model.safetensors")
    load_weights(folder, slots, tied=False)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def keys(seeds: Tensor | list[int], sample: int = 0, kind: int = 0) -> Tensor:
    """`SampledRows.seeds` of rows with these seeds."""
    seeds = torch.as_tensor(seeds)
    return torch.stack((seeds, torch.full_like(seeds, sample + (kind << 32))), dim=1)
