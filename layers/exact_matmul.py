"""Products on Hopper GPUs, in the place of `layers.linear.Matmul`."""

from __future__ import annotations

import functools

from torch import Tensor

from layers.kernels import products
from layers.linear import Matmul
from layers.norm_rope import Gained, Normed, RMSNorm, Stream
from layers.parallel import Place


class ExactMatmul(Matmul):
    """Products on Hopper GPUs by `layers.kernels.products`: their bits depend on no other row.

    Args:
        row, after: see `make_matmul`.
    """

    exact = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        place: Place,
        after: RMSNorm | None = None,
        *,
        row: bool = False,
        gate: str | None = None,
    ) -> None:
        super().__init__(products.interleaved(weight) if gate else weight, bias, place, gate=gate)
        self._after = after
        self._multiply = functools.partial(products.multiply, pdl=True)
        self._add = functools.partial(products.add_product, pdl=True)
        self._parts = products.parts_of(*weight.shape) if row or after is not None else 1
        # With several ranks their products are added up before they meet the stream.
        fuses = after is not None and self._parts > 1 and place.parallel.size == 1
        self._most_fused = products.MAX_FUSED_TOKENS if fuses else 0

    @staticmethod
    def holds(weight: Tensor, bias: Tensor | None, *, gated: bool) -> bool:
        """Whether the kernels can multiply this weight."""
        if gated and (bias is not None or weight.shape[0] % 32):
            return False
        return products.supports_products(*weight.shape)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._multiply(x, self.weight, self._bias, parts=self._parts, out=out)

    def added(self, x: Tensor, stream: Stream) -> Stream:
        after, total = self._after, stream.total
        if after is not None and x.shape[0] <= self._most_fused:
            work = x, self.weight, self._bias, total, after.weight
            total, gained, squares = self._add(*work, parts=self._parts)
            return Stream(total, gained=Gained(after, gained, after.scale_of(squares)))
        partial = self._parts > 1 and self._bias is None
        part = self._multiply(x, self.weight, self._bias, parts=self._parts, partial=partial)
        return Stream(total, part)

    def normed(self, normed: Normed, out: Tensor | None = None) -> tuple[Tensor, Stream]:
        gained, stream = normed.norm.gained(normed.stream)
        work = gained.values, self.weight, self._bias
        return self._multiply(*work, scale=gained.scale, gate=self._gate, out=out), stream
