"""Tables of cosines and sines for the rotary embedding, with the frequencies of transformers."""

from __future__ import annotations

import math
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
    types, for parameters of other types or by kind of layer, and if not all of a head is rotated.
    """
    if kind is None:
        table = torch.zeros(2, max_len, 1, head_dim, dtype=torch.float32)
        table[0] = 1
        return table.to(device)
    parameters = dict(hf_config.rope_parameters or {})
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError(f"rope_parameters by kind of layer: {', '.join(parameters)}")
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise UnsupportedModelError(
            f"rope type {rope_type!r} is unknown to the installed transformers, which knows "
            f"default, {', '.join(ROPE_INIT_FUNCTIONS)}"
        )
    try:
        if rope_type == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
            inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
        else:
            make = ROPE_INIT_FUNCTIONS[rope_type]
            inv_freq, scaling = make(hf_config, torch.device("cpu"), seq_len=max_len)
        usable = parameters.get("partial_rotary_factor") in (None, 1) and math.isfinite(scaling)
        usable = usable and len(inv_freq) == head_dim // 2 and bool(inv_freq.isfinite().all())
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
