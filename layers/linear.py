"""Linear layers that know their share of a tensor-parallel group.

Column-parallel layers divide the outputs, row-parallel ones the inputs and sum afterwards
(Shoeybi et al., Megatron-LM, 2019). Projections that read the same input are merged into one
matrix, so that one product serves them all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.parallel import ParallelContext, WeightSlot, frozen


class MergedColumnLinear(nn.Module):
    """Several column-parallel projections of one input: y = x W^T + b, parts side by side.

    Args:
        input_size: features of the input.
        sizes: output features of each part, over all ranks.
        bias: whether there is a bias.

    The weight is [sum of this rank's parts, input_size].
    """

    def __init__(
        self,
        input_size: int,
        sizes: tuple[int, ...],
        *,
        bias: bool,
        parallel: ParallelContext,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.sizes = sizes
        self._parallel = parallel
        # (start, length) of the outputs of each part that this rank computes.
        self._parts = self._divide()
        rows = sum(length for _, length in self._parts)
        self.weight = frozen(torch.empty(rows, input_size, dtype=dtype, device=device))
        self.bias = frozen(torch.empty(rows, dtype=dtype, device=device)) if bias else None

    def _divide(self) -> list[tuple[int, int]]:
        lengths = [self._parallel.share("output features", size) for size in self.sizes]
        return [(self._parallel.rank * length, length) for length in lengths]

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_size] -> [..., sum of this rank's parts]."""
        return F.linear(x, self.weight, self.bias)

    def weight_slots(self, *names: str) -> dict[str, WeightSlot]:
        """Slots of the checkpoint's layers `names`, one per part, in order."""
        slots: dict[str, WeightSlot] = {}
        row = 0
        for name, size, (start, length) in zip(names, self.sizes, self._parts, strict=True):
            for kind, full in (("weight", (size, self.input_size)), ("bias", (size,))):
                param = getattr(self, kind)
                if param is not None:
                    target = param.data[row : row + length]
                    slots[f"{name}.{kind}"] = WeightSlot(target, full, 0, start, length)
            row += length
        return slots


class QKVLinear(MergedColumnLinear):
    """Query, key and value projections; KV heads are replicated where ranks outnumber them.

    Args:
        num_heads: query heads over all ranks.
        num_kv_heads: KV heads over all ranks.
    """

    def __init__(
        self,
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


class RowLinear(nn.Module):
    """A projection whose inputs are divided over the ranks; the results are summed."""

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
        super().__init__()
        self._full = (output_size, input_size)
        self._parallel = parallel
        self._columns = parallel.share("input features", input_size)
        weight = torch.empty(output_size, self._columns, dtype=dtype, device=device)
        self.weight = frozen(weight)
        self.bias = frozen(torch.empty(output_size, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., this rank's inputs] -> [..., output_size]."""
        # The bias enters the sum once.
        bias = self.bias if self._parallel.rank == 0 else None
        return self._parallel.all_reduce(F.linear(x, self.weight, bias))

    def weight_slots(self, name: str) -> dict[str, WeightSlot]:
        """Slots of the checkpoint's layer `name`."""
        start = self._parallel.rank * self._columns
        slots = {
            f"{name}.weight": WeightSlot(self.weight.data, self._full, 1, start, self._columns)
        }
        if self.bias is not None:
            slots[f"{name}.bias"] = WeightSlot(self.bias.data, self._full[:1])
        return slots
