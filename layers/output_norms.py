"""What models with norms of outputs, or of all heads of Q and K, have in place of other layers."""

from __future__ import annotations

from torch import Tensor

from layers.norm_rope import Gained, QKNormRopeStore, RMSNorm, Stream
from layers.parallel import Place
from layers.rotary import Rotation
from memory.kv_cache import KVLayer
from utils.errors import ConfigError
from utils.loader import WeightTarget


class NoNorm(RMSNorm):
    """Takes the place of a norm where a block's input is the residual stream itself.

    `compute` and `gained` return the stream [T, hidden_size] as it is, after adding what the last
    block has left to add. There are no weights.
    """

    changes = False

    def __init__(self, hidden_size: int, place: Place) -> None:
        super().__init__(hidden_size, 0.0, place)

    def prepare(self) -> None:
        self.weight.fill_(1.0)

    def compute(self, stream: Stream, *, scaled: bool = True) -> tuple[Tensor, Stream]:
        if stream.part is not None:
            # Only the addition is needed. The norm after it is thrown away.
            stream = super().compute(stream, scaled=False)[1]
        return stream.total, stream

    def gained(self, stream: Stream) -> tuple[Gained, Stream]:
        total, stream = self.compute(stream)
        return Gained(self, total, None), stream

    def weight_targets(self, name: str) -> dict[str, WeightTarget]:
        return {}


class WholeNormRopeStore(QKNormRopeStore):
    """Normalises all heads of Q together, and all heads of K together, before it stores K and V.

    A call overwrites Q and K in `qkv` [T, (num_heads + 2 * num_kv_heads) * head_dim]. `place` must
    have one rank, since the norms cover all heads: otherwise a ConfigError is raised.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        place: Place,
        offset: float = 0.0,
    ) -> None:
        if place.parallel.size > 1:
            problem = "is not built for models whose norms of Q and K go over all heads"
            raise ConfigError("tensor_parallel_size", place.parallel.size, problem, "Use 1.")
        super().__init__(num_heads, num_kv_heads, head_dim, None, place)
        sizes = num_heads * head_dim, num_kv_heads * head_dim
        self._norms = [RMSNorm(size, eps, place, offset) for size in sizes]

    def prepare(self) -> None:
        for norm in self._norms:
            norm.prepare()

    def __call__(
        self, qkv: Tensor, rotation: Rotation, slot_mapping: Tensor, kv: KVLayer
    ) -> Tensor:
        start = 0
        for norm in self._norms:
            part = qkv[:, start : start + len(norm.weight)]
            part.copy_(norm.compute(Stream(part))[0])
            start += len(norm.weight)
        return super().__call__(qkv, rotation, slot_mapping, kv)

    def weight_targets(self, q_name: str, k_name: str) -> dict[str, WeightTarget]:
        q, k = self._norms
        return q.weight_targets(q_name) | k.weight_targets(k_name)
