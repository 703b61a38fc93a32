"""Linear layers that know their share of a tensor-parallel group.

Column-parallel layers divide the outputs, row-parallel ones the inputs, whose sum the next norm
forms (Shoeybi et al., Megatron-LM, 2019). Projections that read the same input are merged into one
matrix, so that one product serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layers.layernorm import RMSNorm
from layers.parallel import ParallelContext
from layers.product import Product, make_product
from utils.loader import WeightSlot


class MergedColumnLinear:
    """Several column-parallel projections of one normalised input, parts side by side.

    Args:
        norm: of the input.
        input_size: features of the input.
        sizes: output features of each part, over all ranks.
        bias: whether there is a bias.

    The weight is [sum of this rank's parts, input_size].
    """

    def __init__(
        self,
        norm: RMSNorm,
        input_size: int,
        sizes: tuple[int, ...],
        *,
        bias: bool,
        parallel: ParallelContext,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.norm = norm
        self.input_size = input_size
        self.sizes = sizes
        self._parallel = parallel
        # (start, length) of the outputs of each part that this rank computes.
        self._parts = self._divide()
        rows = sum(length for _, length in self._parts)
        self.weight: Tensor | None = torch.empty(rows, input_size, dtype=dtype, device=device)
        self.bias = torch.empty(rows, dtype=dtype, device=device) if bias else None
        self._product: Product

    def _divide(self) -> list[tuple[int, int]]:
        lengths = [self._parallel.share("output features", size) for size in self.sizes]
        return [(self._parallel.rank * length, length) for length in lengths]

    def finish(self) -> None:
        """The weights are loaded: lay them out for use, and keep only that copy."""
        assert self.weight is not None
        self.norm.finish()
        self._product, self.weight = make_product(self.weight, self.bias, self.norm), None

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream [T, input_size] -> ([T, sum of this rank's parts], the stream's sum).

        For the stream's form see `Product`.
        """
        return self._product.normed(x, residual, self.norm)

    def partial(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As a call, but the parts may be left in partial sums, see `Product.partial`."""
        return self._product.normed(x, residual, self.norm, partial=True)

    def gated(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As a call, with silu(first part) * second part in the parts' place."""
        return self._product.gated(x, residual, self.norm)

    def weight_slots(self, *names: str) -> dict[str, WeightSlot]:
        """Slots of the checkpoint's layers `names`, one per part, in order."""
        slots: dict[str, WeightSlot] = {}
        row = 0
        for name, size, (start, length) in zip(names, self.sizes, self._parts, strict=True):
            for kind, full in (("weight", (size, self.input_size)), ("bias", (size,))):
                param = getattr(self, kind)
                if param is not None:
                    target = param[row : row + length]
                    slots[f"{name}.{kind}"] = WeightSlot(target, full, 0, start, length)
            row += length
        return slots


class QKVLinear(MergedColumnLinear):
    """Query, key and value projections; KV heads are replicated where ranks outnumber them.

    Args:
        norm: of the input.
        num_heads: query heads over all ranks.
        num_kv_heads: KV heads over all ranks.
    """

    def __init__(
        self,
        norm: RMSNorm,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        parallel: ParallelContext,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._heads = (num_heads, num_kv_heads, head_dim)
        kv_size = num_kv_heads * head_dim
        super().__init__(
            norm,
            hidden_size,
            (num_heads * head_dim, kv_size, kv_size),
            bias=bias,
            parallel=parallel,
            dtype=dtype,
            device=device,
        )

    def _divide(self) -> list[tuple[int, int]]:
        num_heads, num_kv_heads, head_dim = self._heads
        q = self._parallel.share("query heads", num_heads) * head_dim
        first, count = self._parallel.kv_heads(num_kv_heads)
        kv = (first * head_dim, count * head_dim)
        return [(self._parallel.rank * q, q), kv, kv]


class RowLinear:
    """A projection onto the residual stream, its inputs divided over the ranks.

    What it adds is left to the next norm to sum over the ranks.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool,
        parallel: ParallelContext,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._full = (output_size, input_size)
        self._parallel = parallel
        self._columns = parallel.share("input features", input_size)
        self.weight: Tensor | None = torch.empty(
            output_size, self._columns, dtype=dtype, device=device
        )
        self.bias = torch.empty(output_size, dtype=dtype, device=device) if bias else None
        self._product: Product

    def finish(self) -> None:
        """The weights are loaded: lay them out for use, and keep only that copy."""
        assert self.weight is not None
        # The bias enters the sum over ranks once.
        bias = self.bias if self._parallel.rank == 0 else None
        self._product, self.weight = make_product(self.weight, bias), None

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [T, this rank's inputs] and the stream's sum [T, output_size] -> the stream after it.

        For the stream's form see `Product`.
        """
        if self._parallel.size == 1:
            return self._product.added(x, residual)
        return self._product.partial(x), residual

    def weight_slots(self, name: str) -> dict[str, WeightSlot]:
        """Slots of the checkpoint's layer `name`."""
        assert self.weight is not None
        start = self._parallel.rank * self._columns
        slots = {f"{name}.weight": WeightSlot(self.weight, self._full, 1, start, self._columns)}
        if self.bias is not None:
            slots[f"{name}.bias"] = WeightSlot(self.bias, self._full[:1])
        return slots
