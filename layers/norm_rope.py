"""The residual stream and its RMS norm (Zhang and Sennrich, 2019); rotations of queries and keys.

The rotary position embedding (Su et al., RoFormer, 2021) is scaled as the checkpoint asks.
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
from utils.loader import WeightTarget


# Nothing changes these two once they are made. A frozen one takes 0.45 us to make instead of 0.18,
# and a forward pass of the shipped model, 1.2 ms on a CPU, makes 34.
@dataclass(slots=True)
class Stream:
    """The residual stream of T tokens: total + part.

    Attributes:
        total: [T, hidden_size], the same on every rank.
        part: what a layer has added and the next norm sums up: [T, hidden_size], this rank's share
            of a sum over ranks; or partial sums of that, [S, T, hidden_size] float32.
    """

    total: Tensor
    part: Tensor | None = None


@dataclass(slots=True)
class Normed:
    """A stream to be normalised by the linear that reads it, in its kernel or by `norm.compute`."""

    norm: RMSNorm
    stream: Stream


class RMSNormalizer:
    """x / sqrt(mean(x^2) + eps) over the last dimension of size n, in float32.

    Computed as sqrt(n) * x / hypot(|x|, sqrt(n * eps)), in 4 us where torch's rms_norm takes 7 for
    one row on a CPU. The factor sqrt(n) is left to the caller, who folds it into a weight.
    """

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        self._floor = torch.tensor((size * eps) ** 0.5, dtype=torch.float32, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., n] of any float dtype -> the same shape in float32."""
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
        self._scale = self.weight.float() * len(self.weight) ** 0.5

    def take_scale(self) -> Tensor:
        """The factors [hidden_size] float32, which `compute` leaves out from then on."""
        assert self._scale is not None
        scale, self._scale = self._scale, None
        return scale

    def __call__(self, stream: Stream) -> Normed:
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
            from layers.kernels.rowwise import rms_norm

            y, total = rms_norm(total, self.weight, self.eps, part, pdl=place.pdl)
            return y, Stream(total)
        if part is not None:
            stream = Stream(total := part + total)
        y = self._normalize(total)
        if self._scale is not None:
            y = (y * self._scale).to(total.dtype)
        return y, stream

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        return {f"{name}.weight": WeightTarget(self.weight, tuple(self.weight.shape))}


def rotary_table(hf_config: Any, head_dim: int, max_len: int, device: torch.device) -> Tensor:
    """Cosines and signed sines of every position, [2, max_len, 1, head_dim] float32.

    With x = [x1 | x2] in halves, rotation is x * table[0] + [x2 | x1] * table[1].

    The frequencies are those of transformers for `max_len` tokens, for all positions. ("dynamic"
    and "longrope" change them in transformers as a sequence grows; the cache's keys forbid that.)

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

    Cosines and sines are those of `rotary_table` at the positions, [T, 1, head_dim], or, for a
    kernel that looks them up, of all positions, [max_model_len, head_dim / 2] and unsigned.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor


class RotaryEmbedding:
    """The rotations of one model by its `rotary_table`, shared by its layers.

    With `gather` a step's positions are looked up once; else a fused kernel reads the table.
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

    The heads are this rank's; `eps` is None in models that do not normalise Q and K.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, eps: float | None, place: Place
    ) -> None:
        self._num_heads, self._num_qk = num_heads, num_heads + num_kv_heads
        self._num_all = num_heads + 2 * num_kv_heads
        self._head_dim, self._eps, self._place = head_dim, eps, place
        self.qk_weight: Tensor | None = None
        self._scale: Tensor
        if eps is not None:
            # One row per head, so that Q and K are normalised in one call.
            self.qk_weight = place.empty(self._num_qk, head_dim)
            self._normalize = RMSNormalizer(head_dim, eps, place.device)

    def prepare(self) -> None:
        if self.qk_weight is not None:
            self._scale = self.qk_weight.float() * self._head_dim**0.5

    def __call__(
        self, qkv: Tensor, rotation: Rotation, slot_mapping: Tensor, kv: KVLayer
    ) -> Tensor:
        """Rotated queries [T, num_heads, head_dim]; may overwrite `qkv`, writes into `kv`.

        Args:
            qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; or, for fused kernels,
                partial sums [S, T, ...] float32.
            slot_mapping: [T] rows of `kv.flat`; -1, for fused kernels alone, stores nothing.
        """
        weight = self.qk_weight
        if self._place.fused:
            from layers.kernels.rowwise import qk_norm_rope_store

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

    def weight_targets(self, q_name: str, k_name: str) -> dict[str, WeightTarget]:
        if self.qk_weight is None:
            return {}
        parts = zip((q_name, k_name), self.qk_weight.tensor_split([self._num_heads]), strict=True)
        return {f"{name}.weight": WeightTarget(part, (self._head_dim,)) for name, part in parts}
