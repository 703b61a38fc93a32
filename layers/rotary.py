"""Rotary embedding (Su et al., 2021): tables with the frequencies of transformers, their rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from utils.errors import UnsupportedModelError


def rotary_table(
    hf_config: Any, head_dim: int, max_len: int, device: torch.device, kind: str | None = ""
) -> Tensor:
    """Return a table of cosines and sines for all positions, float32 [2, max_len, 1, head_dim].

    `kind` is a kind of layer that has rope parameters of its own, "" if all layers have the same
    ones, or None for layers that rotate nothing: their cosines are 1 and their sines 0.

    A head's vector x with the halves [x1 | x2] is rotated to x * table[0] + [x2 | x1] * table[1].
    For this formula the sines of the first half are negated. All positions are rotated with the
    frequencies that transformers uses for a sequence of `max_len` tokens. With the rope types
    "dynamic" and "longrope" transformers changes frequencies as a sequence grows. This engine does
    not, because cached keys are already rotated. Raises UnsupportedModelError for unknown rope
    types, for parameters of wrong types, if not all of a head is rotated, and if `kind` is "" and
    each kind of layer has its own parameters, or the reverse.
    """
    if kind is None:
        table = torch.zeros(2, max_len, 1, head_dim, dtype=torch.float32)
        table[0] = 1
        return table.to(device)
    parameters = dict(hf_config.rope_parameters or {})
    by_kind = any(isinstance(value, dict) for value in parameters.values())
    if by_kind != bool(kind):
        raise UnsupportedModelError(f"rope_parameters by kind of layer: {', '.join(parameters)}")
    if kind:
        parameters = dict(parameters.get(kind) or {})
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise UnsupportedModelError(
            f"rope type {rope_type!r} is unknown to the installed transformers, which knows "
            f"default, {', '.join(ROPE_INIT_FUNCTIONS)}"
        )
    if (share := parameters.get("partial_rotary_factor")) not in (None, 1):
        problem = "only rotations of whole heads are built"
        raise UnsupportedModelError(f"rope with partial_rotary_factor={share!r}: {problem}")
    try:
        if rope_type == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
            inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
        else:
            make = ROPE_INIT_FUNCTIONS[rope_type]
            inv_freq, scaling = make(
                hf_config, torch.device("cpu"), seq_len=max_len, layer_type=kind or None
            )
        usable = len(inv_freq) == head_dim // 2 and bool(inv_freq.isfinite().all())
        usable = usable and math.isfinite(scaling)
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"rope_parameters={parameters} fail: {error!r}") from error
    if not usable:
        problem = "must give a finite frequency to all pairs of a head's elements"
        raise UnsupportedModelError(f"rope_parameters={parameters} {problem}")
    positions = torch.arange(max_len, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, inv_freq.float().cpu())
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
    return table.unsqueeze(2).to(device)


def query_scales(hf_config: Any, max_len: int, device: torch.device) -> Tensor:
    """Return a factor of the queries for each position, float32 [max_len], as Llama 4 has them.

    The factor is 1 + beta * log(1 + floor(position / the length of the first training)). Raises
    UnsupportedModelError if the config lacks one of the two parameters.
    """
    parameters = hf_config.rope_parameters or {}
    beta = parameters.get("llama_4_scaling_beta")
    length = parameters.get("original_max_position_embeddings")
    if beta is None or not length:
        problem = "must have llama_4_scaling_beta and original_max_position_embeddings"
        raise UnsupportedModelError(f"rope_parameters={dict(parameters)} {problem}")
    positions = torch.arange(max_len, dtype=torch.float32, device="cpu")
    scales: Tensor = 1 + beta * torch.log1p(torch.floor(positions / length))
    return scales.to(device)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Positions [T] of a step's tokens, and the cosines and sines that rotate Q and K.

    For torch, `cos` and `sin` are the rows of `rotary_table` for these positions, [T, 1, head_dim].
    For Triton kernels both have all positions, [max_model_len, head_dim / 2]; no sine is negated.
    Rotated queries are to be multiplied by `query_scale` [T, 1, 1], if it is not None.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None


class RotaryEmbedding:
    """A model's rotary embeddings (RoFormer), one for each kind of layer.

    `tables` are results of `rotary_table`, float32 [2, max_model_len, 1, head_dim]. `query_scale`
    is the result of `query_scales`, float32 [max_model_len], or None. If `gather` is True,
    `prepare` returns a `Rotation` for torch, with the rows of the table that a step needs.
    Otherwise it returns a `Rotation` for Triton kernels, which find the rows.
    """

    def __init__(self, *tables: Tensor, gather: bool, query_scale: Tensor | None = None) -> None:
        self._gather, self._scale = gather, query_scale
        self._tables = [(cos, sin) for cos, sin in tables]
        if not gather:
            half = tables[0].shape[-1] // 2
            # Triton kernels get half the columns. The others differ only in the sign of the sines.
            self._tables = [
                (cos[:, 0, :half].contiguous(), sin[:, 0, half:].contiguous())
                for cos, sin in self._tables
            ]

    def prepare(self, positions: Tensor) -> tuple[Rotation, ...]:
        """Return each table's `Rotation` for the `positions`, int64 [T], of a step's tokens."""
        scale, tables = self._scale, self._tables
        if scale is not None:
            scale = scale.index_select(0, positions).view(-1, 1, 1)
        if self._gather:
            tables = [
                (c.index_select(0, positions), s.index_select(0, positions)) for c, s in tables
            ]
        return tuple(Rotation(positions, cos, sin, scale) for cos, sin in tables)
