"""Residual stream, RMS norm (Zhang and Sennrich, 2019), rotary embedding (Su et al., 2021)."""

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


# `Stream` and `Normed` are not frozen: a frozen dataclass takes 0.45 us to construct instead of
# 0.18 us. A forward pass of the shipped model takes 1.2 ms on a CPU and constructs 34 instances.
@dataclass(slots=True)
class Stream:
    """The residual stream of T tokens: its value is total + the sum of part over all ranks.

    Attributes:
        total: sum of embeddings and earlier outputs [T, hidden_size], the same on every rank.
        part: a block's output [T, hidden_size] on this rank, or S partial sums of that output
            [S, T, hidden_size] float32, which the next norm adds to total. None adds nothing.
    """

    total: Tensor
    part: Tensor | None = None


@dataclass(slots=True)
class Normed:
    """A stream and the norm that the next linear layer applies, fused or by `norm.compute`."""

    norm: RMSNorm
    stream: Stream


class RMSNormalizer:
    """x / sqrt(mean(x^2) + eps) / sqrt(n) over the last dimension, of size n, in float32.

    The code computes x / hypot(|x|, sqrt(n * eps)) with the Euclidean norm |x|. For one row on a
    CPU this takes 4 us, and torch's rms_norm 7 us. The caller's weight has the missing factor.
    """

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        self._floor = torch.tensor((size * eps) ** 0.5, dtype=torch.float32, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise x [..., n] of any float dtype; the result is float32."""
        if x.dtype != torch.float32:
            x = x.float()
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._floor)


class RMSNorm:
    """RMS norm of the residual stream: x / sqrt(mean(x^2) + eps) * weight [hidden_size]."""

    def __init__(self, hidden_size: int, eps: float, place: Place) -> None:
        self.eps = eps
        self.weight = place.empty(hidden_size)
        self._place = place
        self._normalize = RMSNormalizer(hidden_size, eps, place.device)
        self.scale: Tensor

    def prepare(self) -> None:
        """Make `scale` [hidden_size] float32, the factor of `RMSNormalizer`'s result."""
        self.scale = self.weight.float() * len(self.weight) ** 0.5

    def __call__(self, stream: Stream) -> Normed:
        return Normed(self, stream)

    def compute(self, stream: Stream, *, scaled: bool = True) -> tuple[Tensor, Stream]:
        """Return norm(total + part) [T, hidden_size], and the stream with part added to total.

        `scaled` is False for a linear layer on a CPU that has folded `scale` into its weight.
        """
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
        return (y * self.scale).to(total.dtype) if scaled else y, stream

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        return {f"{name}.weight": WeightTarget(self.weight, tuple(self.weight.shape))}


def rotary_table(hf_config: Any, head_dim: int, max_len: int, device: torch.device) -> Tensor:
    """Return cosines and sines for all positions, [2, max_len, 1, head_dim] float32.

    For x in halves [x1 | x2] the rotated vector is x * table[0] + [x2 | x1] * table[1]. So sines in
    the first half of a row are negated. All positions have the frequencies that transformers uses
    for `max_len` tokens. transformers changes "dynamic" and "longrope" frequencies as a sequence
    grows; this engine does not, since keys in the cache are already rotated by older frequencies.
    Raises UnsupportedModelError for an unknown rope type.
    """
    parameters = dict(hf_config.rope_parameters)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError(f"rope_parameters by kind of layer: {', '.join(parameters)}")
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
    """Positions [T] of a step's tokens, and the cosines and sines to rotate by.

    Torch code gets the rows of `rotary_table` for these positions, [T, 1, head_dim]. Fused kernels
    get a table of all positions, [max_model_len, head_dim / 2], with sines that are not negated.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor


class RotaryEmbedding:
    """The rotary embedding (RoFormer) of a model, made from `rotary_table`, shared by all layers.

    With `gather`, `prepare` selects the rows of a step; otherwise fused kernels get all rows.
    """

    def __init__(self, table: Tensor, *, gather: bool) -> None:
        self._gather = gather
        self._cos, self._sin = table
        if not gather:
            half = table.shape[-1] // 2
            # Kernels take half of each row: for sines the second half, since the first is negated.
            self._cos = self._cos[:, 0, :half].contiguous()
            self._sin = self._sin[:, 0, half:].contiguous()

    def prepare(self, positions: Tensor) -> Rotation:
        """Return what the layers of one step need to rotate tokens at `positions` [T]."""
        cos, sin = self._cos, self._sin
        if self._gather:
            cos, sin = cos.index_select(0, positions), sin.index_select(0, positions)
        return Rotation(positions, cos, sin)


class QKNormRopeStore:
    """Normalises Q and K, rotates Q and K, and writes K and V to the paged KV cache.

    Head counts are those of this rank. `eps` is None for models that do not normalise Q and K.
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
            # Weights of Q and K are repeated for each head, so that one call normalises both.
            self.qk_weight = place.empty(self._num_qk, head_dim)
            self._normalize = RMSNormalizer(head_dim, eps, place.device)

    def prepare(self) -> None:
        if self.qk_weight is not None:
            self._scale = self.qk_weight.float() * self._head_dim**0.5

    def __call__(
        self, qkv: Tensor, rotation: Rotation, slot_mapping: Tensor, kv: KVLayer
    ) -> Tensor:
        """Return rotated queries [T, num_heads, head_dim], and store K and V in `kv`.

        Args:
            qkv: contiguous [T, (num_heads + 2 * num_kv_heads) * head_dim]; may be overwritten.
                Fused kernels also take S float32 summands of Q, K and V, [S, T, ...].
            slot_mapping: rows [T] of `kv.flat` to store K and V in. For a row of -1, fused kernels
                store nothing.
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
