"""Rotary position embedding (Su et al., RoFormer, 2021), scaled as the checkpoint asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from layers.forward_batch import Rotation
from layers.layernorm import RMSNormalizer
from layers.parallel import Place
from memory.kv_cache import KVLayer
from utils.errors import UnsupportedModelError
from utils.loader import WeightSlot


def rotary_table(hf_config: Any, head_dim: int, max_len: int, device: torch.device) -> Tensor:
    """Cosines and signed sines of every position.

    The frequencies are the ones transformers uses for a sequence of `max_len` tokens. For the
    scalings that depend on the current length ("dynamic", "longrope"), transformers changes
    them while a sequence grows, which invalidates keys already in the cache; here they are
    those of the longest sequence, for all positions.

    Returns:
        [2, max_len, 1, head_dim] float32. With x = [x1 | x2] in halves, rotation is
        x * table[0] + [x2 | x1] * table[1].

    Raises:
        UnsupportedModelError: transformers has no such rope type for a single set of layers.
    """
    parameters = dict(hf_config.rope_parameters)
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    elif rope_type in ROPE_INIT_FUNCTIONS:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](
            hf_config, torch.device("cpu"), seq_len=max_len
        )
    else:
        raise UnsupportedModelError(
            f"rope type {rope_type!r} is unknown to the installed transformers, which knows "
            f"default, {', '.join(ROPE_INIT_FUNCTIONS)}"
        )
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq.float().cpu())
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
    return table.unsqueeze(2).to(device)


class RotaryEmbedding:
    """The rotations of one model, shared by its layers.

    Args:
        table: see `rotary_table`.
        gather: look a step's positions up once for all layers; else a fused kernel reads the
            table itself.
    """

    def __init__(self, table: Tensor, *, gather: bool) -> None:
        self._gather = gather
        self._cos, self._sin = table
        if not gather:
            half = table.shape[-1] // 2
            # The sine of the second half has the plain sign.
            self._cos = self._cos[:, 0, :half].contiguous()
            self._sin = self._sin[:, 0, half:].contiguous()

    def prepare(self, positions: Tensor) -> Rotation:
        """What the layers of one step need for tokens at `positions` [T]."""
        cos, sin = self._cos, self._sin
        if self._gather:
            cos, sin = cos.index_select(0, positions), sin.index_select(0, positions)
        return Rotation(positions, cos, sin)


class QKNormRopeStore:
    """Between projection and attention: normalise Q and K, rotate them, write K and V to pages.

    Args:
        num_heads, num_kv_heads: this rank's heads.
        eps: of the Q and K normalisation; None if the model has none.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, eps: float | None, place: Place
    ) -> None:
        self._num_heads = num_heads
        self._num_qk = num_heads + num_kv_heads
        self._num_all = num_heads + 2 * num_kv_heads
        self._head_dim = head_dim
        self._eps = eps
        self._place = place
        self.qk_weight: Tensor | None = None
        self._scale: Tensor
        if eps is not None:
            # One row per head, so that Q and K are normalised in one call.
            self.qk_weight = place.empty(self._num_qk, head_dim)
            self._normalize = RMSNormalizer(head_dim, eps, place.device)

    def prepare(self) -> None:
        """The weights are loaded."""
        if self.qk_weight is not None:
            self._scale = self.qk_weight.float() * self._head_dim**0.5

    def __call__(
        self, qkv: Tensor, rotation: Rotation, slot_mapping: Tensor, kv: KVLayer
    ) -> Tensor:
        """Rotated queries [T, num_heads, head_dim]; may overwrite `qkv`, writes into `kv`.

        Args:
            qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; partial sums
                [S, T, ...] in float32 where kernels are fused.
            slot_mapping: [T] rows of `kv.flat`; negative ones, which only the fused kernel
                takes, store nothing.
        """
        weight = self.qk_weight
        if self._place.fused:
            from layers.kernels.qkv import qk_norm_rope_store

            return qk_norm_rope_store(
                qkv,
                None if weight is None else (weight[0], weight[-1]),
                self._eps or 0.0,
                rotation,
                slot_mapping,
                kv,
                pdl=self._place.pdl,
            )
        heads = qkv.view(-1, self._num_all, self._head_dim)
        qk = heads[:, : self._num_qk]
        x = qk.float() if weight is None else self._normalize(qk).mul_(self._scale)
        turned = x.roll(self._head_dim // 2, -1)
        if qk.dtype == torch.float32:
            torch.addcmul(x.mul_(rotation.cos), turned, rotation.sin, out=qk)
        else:
            qk.copy_(x.mul_(rotation.cos).addcmul_(turned, rotation.sin))
        kv.flat.index_copy_(0, slot_mapping, heads[:, self._num_heads :])
        return heads[:, : self._num_heads]

    def weight_slots(self, q_name: str, k_name: str) -> dict[str, WeightSlot]:
        """Slots of the checkpoint's normalisation weights, [head_dim] each."""
        if self.qk_weight is None:
            return {}
        q, k = self.qk_weight[: self._num_heads], self.qk_weight[self._num_heads :]
        shape = (self._head_dim,)
        return {f"{q_name}.weight": WeightSlot(q, shape), f"{k_name}.weight": WeightSlot(k, shape)}
