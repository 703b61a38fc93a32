"""Residual stream, RMS norm (Zhang and Sennrich, 2019), rotary embedding (Su et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from layers.parallel import Place
from layers.rotary import Rotation
from memory.kv_cache import KVLayer
from utils.loader import WeightTarget

# In float16 the stream times a norm's weight could overflow. So it is multiplied by a power of two,
# which leaves the bits of normal numbers alone.
GAIN = {torch.bfloat16: 1.0, torch.float16: 2.0**-4}


class Gained(NamedTuple):
    """A stream [T, hidden_size] times the weight of `norm` and `GAIN`; `scale` is still to come."""

    norm: RMSNorm
    values: Tensor
    scale: Scale | None  # None if the stream has no norm


class Scale(NamedTuple):
    """The factor 1 / sqrt(sum(squares) / size + eps) of each token of a `Gained` stream.

    `squares` is float32 [S, T]: S sums of squares of the stream for each of T tokens, to be added
    up as a binary tree over neighbours. `size` and `eps` contain GAIN.
    """

    squares: Tensor
    size: float
    eps: float


# `Stream` and `Normed` are not frozen, as constructing a frozen one takes 0.45 us, not 0.18 us.
@dataclass(slots=True)
class Stream:
    """The residual stream of T tokens: its value is total + the sum of part over all ranks.

    Attributes:
        total: embedding plus outputs of attentions and MLPs, [T, hidden_size], equal on all ranks.
        part: this rank's output of the last attention or MLP, which the next norm adds to total:
            [T, hidden_size], or S float32 summands of the output, [S, T, hidden_size], S = 2 or 4.
            `part` is None if total already contains the output.
        gained: what one norm makes of total, if the kernel that computed total has done so too.
        post: the norm of the sum of part over all ranks, if it has one before it is added to total.
    """

    total: Tensor
    part: Tensor | None = None
    gained: Gained | None = None
    post: RMSNorm | None = None


@dataclass(slots=True)
class Normed:
    """A stream and its norm. The linear layer that takes a `Normed` as input applies the norm."""

    norm: RMSNorm
    stream: Stream


class RMSNormalizer:
    """Computes x / sqrt(mean(x^2) + eps) / sqrt(n) over the last dimension, of size n, in float32.

    The code computes x / hypot(|x|, sqrt(n * eps)) with the Euclidean norm |x|. For one row on a
    CPU this formula takes 4 us, and torch's rms_norm 7 us. Callers multiply the result by sqrt(n).
    """

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        self._floor = torch.tensor((size * eps) ** 0.5, dtype=torch.float32, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            x = x.float()
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._floor)


class RMSNorm:
    """RMS norm of the residual stream: x / sqrt(mean(x^2) + eps) * (weight + offset)."""

    changes = True  # whether the norm of a stream is anything else than the stream

    def __init__(self, hidden_size: int, eps: float, place: Place, offset: float = 0.0) -> None:
        self.eps, self._offset = eps, offset
        self.weight = place.empty(hidden_size)
        self._place = place
        self._normalize = RMSNormalizer(hidden_size, eps, place.device)
        self.scale: Tensor

    def prepare(self) -> None:
        """Set `scale`, the factor for `RMSNormalizer`'s result, to weight * sqrt(hidden_size)."""
        if self._offset:
            self.weight = self.weight.float() + self._offset  # not rounded to 16 bits
        self.scale = self.weight.float() * len(self.weight) ** 0.5

    def __call__(self, stream: Stream) -> Normed:
        return Normed(self, stream)

    def compute(self, stream: Stream, *, scaled: bool = True) -> tuple[Tensor, Stream]:
        """Return norm(total + part) [T, hidden_size], and the stream with part added to total.

        If `scaled` is False, the factor `scale` is left out, since the next weight contains it.
        """
        total, part, post, place = stream.total, stream.part, stream.post, self._place
        if part is not None and place.parallel.size > 1:
            if post is None:
                both = place.parallel.add_rms_norm(part, total, self.weight, self.eps)
                if both is not None:
                    return both[0], Stream(both[1])
            part = self._reduced(part)
        if place.fused:
            from layers.kernels.rowwise import rms_norm

            of_part = None if post is None else (post.weight, post.eps)
            y, total = rms_norm(total, self.weight, self.eps, part, of_part, pdl=place.pdl)
            return y, Stream(total)
        if part is not None:
            part = part if post is None else post.of(part)
            stream = Stream(total := part + total)
        return self.of(total) if scaled else self._normalize(total), stream

    def of(self, x: Tensor) -> Tensor:
        """Return the norm of x [T, hidden_size], computed by torch."""
        return (self._normalize(x) * self.scale).to(x.dtype)

    def _reduced(self, part: Tensor) -> Tensor:
        if part.dim() == 3:
            # `part.sum(0)` would add in an order that torch chooses by shape.
            first = part[0] + part[1]
            part = first if len(part) == 2 else first + (part[2] + part[3])
            part = part.to(self._place.dtype)
        return self._place.parallel.all_reduce(part)

    def gained(self, stream: Stream) -> tuple[Gained, Stream]:
        """Return what the norm makes of the stream, and the stream with part added to total."""
        if stream.gained is not None and stream.gained.norm is self:
            return stream.gained, stream
        from layers.kernels.rowwise import gain_rows

        part, post, place = stream.part, stream.post, self._place
        if part is not None and place.parallel.size > 1:
            if post is None:
                work = part, stream.total, self.weight, self.eps
                done = place.parallel.add_rms_norm(*work, gained=True)
                if done is not None and done[2] is not None:
                    return Gained(self, done[0], self.scale_of(done[2])), Stream(done[1])
            part = self._reduced(part)
        of_part = None if post is None else (post.weight, post.eps)
        values, squares, total = gain_rows(stream.total, self.weight, part, of_part, pdl=place.pdl)
        return Gained(self, values, self.scale_of(squares)), Stream(total)

    def scale_of(self, squares: Tensor) -> Scale:
        """Return the `Scale` of a stream whose sums of squares are `squares` [S, T]."""
        gain = GAIN[self._place.dtype] ** 2
        return Scale(squares, len(self.weight) / gain, self.eps * gain)

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        return {f"{name}.weight": WeightTarget(self.weight, tuple(self.weight.shape))}


class QKNormRopeStore:
    """Normalises Q and K, rotates Q and K, and writes K and V to the paged KV cache.

    The numbers of heads are those of this rank. `eps` is None if heads are not normalised. `offset`
    is added to the weights of their norms.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float | None,
        place: Place,
        offset: float = 0.0,
    ) -> None:
        self._num_heads, self._num_qk = num_heads, num_heads + num_kv_heads
        self._num_all = num_heads + 2 * num_kv_heads
        self._head_dim, self._eps, self._place = head_dim, eps, place
        self._offset = offset
        self.qk_weight: Tensor | None = None
        self._scale: Tensor
        if eps is not None:
            # The norm weights are repeated for each head, so that one call normalises both Q and K.
            self.qk_weight = place.empty(self._num_qk, head_dim)
            self._normalize = RMSNormalizer(head_dim, eps, place.device)

    def prepare(self) -> None:
        if self.qk_weight is not None:
            if self._offset:
                self.qk_weight = self.qk_weight.float() + self._offset
            self._scale = self.qk_weight.float() * self._head_dim**0.5

    def __call__(
        self, qkv: Tensor, rotation: Rotation, slot_mapping: Tensor, kv: KVLayer
    ) -> Tensor:
        """Store K and V in `kv`, and return the rotated queries [T, num_heads, head_dim].

        Args:
            qkv: Q, K and V, contiguous [T, (num_heads + 2 * num_kv_heads) * head_dim]; may be
                overwritten.
            slot_mapping: for each token the index in `kv.flat` at which its K and V are stored,
                [T]. If the index is -1, Triton kernels store no K and V for the token.
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
