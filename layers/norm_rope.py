"""The residual stream and its norm, and the norm and rotation of queries and keys.

Root-mean-square normalisation is by Zhang and Sennrich (2019), rotary position embedding by Su et
al. (RoFormer, 2021), scaled as the checkpoint asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from layers.parallel import Place
from memory.kv_cache import KVLayer
from utils.errors import UnsupportedModelError
from utils.loader import WeightSlot


# Nothing changes these two once they are made. They are not frozen because a frozen one takes 0.45
# us to make instead of 0.18, and a forward pass of the shipped model, 1.2 ms on a CPU, makes 34.
@dataclass(slots=True)
class Stream:
    """The residual stream of T tokens: total + part.

    Attributes:
        total: [T, hidden_size], the same on every rank.
        part: what a layer has added and the next norm sums up, None if there is nothing:
            [T, hidden_size], this rank's share of a sum over ranks; or float32 partial sums of
            that, [S, T, hidden_size], where kernels are fused.
    """

    total: Tensor
    part: Tensor | None = None


@dataclass(slots=True)
class Normed:
    """A stream to be normalised, and the norm: nothing is computed yet.

    The linear that reads this value normalises in its own kernel or calls `norm.compute(stream)`.
    """

    norm: RMSNorm
    stream: Stream


class RMSNormalizer:
    """x / sqrt(mean(x^2) + eps) over the last dimension of size n, in float32.

    Computed as x * sqrt(n) / hypot(|x|, sqrt(n * eps)): three operations where torch's
    composite rms_norm takes seven (4 against 7 us for one row on a CPU). The caller multiplies
    by sqrt(n), because it has a weight to fold it into.
    """

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        self._floor = torch.tensor((size * eps) ** 0.5, dtype=torch.float32, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., n] of any float dtype -> the same in float32, without the factor sqrt(n)."""
        if x.dtype != torch.float32:
            x = x.float()
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._floor)


class RMSNorm:
    """The norm of the residual stream: x / sqrt(mean(x^2) + eps) * weight [hidden_size]."""

    def __init__(self, hidden_size: int, eps: float, place: Place) -> None:
        self.eps = eps
        self.weight = place.empty(hidden_size)
        self._place = place
        self._normalize = RMSNormalizer(hidden_size, eps, place.device)
        self._scale: Tensor | None = None

    def prepare(self) -> None:
        """The weight is loaded."""
        self._scale = self.weight.float() * len(self.weight) ** 0.5

    def take_scale(self) -> Tensor:
        """Hand the factors [hidden_size] float32 to the one product that reads this norm.

        From then on `compute` leaves them out.
        """
        assert self._scale is not None
        scale, self._scale = self._scale, None
        return scale

    def __call__(self, stream: Stream) -> Normed:
        """The normalised stream, which the linear that reads it computes."""
        return Normed(self, stream)

    def compute(self, stream: Stream) -> tuple[Tensor, Stream]:
        """The normalised sum of total and part [T, hidden_size], and the stream as that sum."""
        total, part, place = stream.total, stream.part, self._place
        if part is not None and place.parallel.size > 1:
            both = place.parallel.add_rms_norm(part, total, self.weight, self.eps)
            if both is not None:
                return both[0], Stream(both[1])
            part = part if part.dim() == 2 else part.sum(0).to(total.dtype)
            part = place.parallel.all_reduce(part)
        if place.fused:
            from layers.kernels.norm import add_rms_norm, rms_norm

            if part is None:
                return rms_norm(total, self.weight, self.eps, pdl=place.pdl), stream
            y, total = add_rms_norm(part, total, self.weight, self.eps, pdl=place.pdl)
            return y, Stream(total)
        if part is not None:
            stream = Stream(total := part + total)
        y = self._normalize(total)
        if self._scale is not None:
            y = (y * self._scale).to(total.dtype)
        return y, stream

    def weight_slots(self, name: str) -> dict[str, WeightSlot]:
        """Slot of the checkpoint's tensor `name`.weight."""
        return {f"{name}.weight": WeightSlot(self.weight, tuple(self.weight.shape))}


def rotary_table(hf_config: Any, head_dim: int, max_len: int, device: torch.device) -> Tensor:
    """Cosines and signed sines of every position, [2, max_len, 1, head_dim] float32.

    With x = [x1 | x2] in halves, rotation is x * table[0] + [x2 | x1] * table[1].

    The frequencies are those of transformers for a sequence of `max_len` tokens, for all positions.
    Where the scaling depends on the length ("dynamic", "longrope"), transformers changes them while
    a sequence grows, which would invalidate keys in the cache.

    Raises:
        UnsupportedModelError: transformers has no such rope type for a single set of layers.
    """
    parameters = dict(hf_config.rope_parameters)
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    elif rope_type in ROPE_INIT_FUNCTIONS:
        make = ROPE_INIT_FUNCTIONS[rope_type]
        inv_freq, scaling = make(hf_config, torch.device("cpu"), seq_len=max_len)
    else:
        raise UnsupportedModelError(
            f"rope type {rope_type!r} is unknown to the installed transformers, which knows "
            f"default, {', '.join(ROPE_INIT_FUNCTIONS)}"
        )
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq.float().cpu())
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
    return table.unsqueeze(2).to(device)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Where the T tokens of a step stand, and the angles to rotate them by.

    Attributes:
        positions: [T].
        cos, sin: rows of `rotary_table` at those positions, [T, 1, head_dim] float32; or
            [max_model_len, head_dim / 2] float32, unsigned, for a kernel that looks them up.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor


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
                None if weight is None else weight[0],
                None if weight is None else weight[-1],
                self._eps or 0.0,
                rotation.cos,
                rotation.sin,
                rotation.positions,
                slot_mapping,
                kv.k,
                kv.v,
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
