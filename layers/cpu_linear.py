"""Matrix products on a CPU of float32 inputs and weights that float16 can hold exactly."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

# Weights with more elements are kept in float16 only, in half the memory; smaller weights are also
# kept in float32 for oneDNN. For a weight [6144, 1024] FBGEMM (float16) takes 0.42 times as long as
# oneDNN (float32) for 1 row of inputs, and 1.16 times for 512 rows or more.
_HALF_BESIDE = 2**20
# Smaller weights use FBGEMM up to 64 rows. With 64 rows FBGEMM takes 0.83 to 1.0 times as long as
# oneDNN.
_MOST_ROWS = 64
# With smaller weights, products of at most this many multiplications run on one thread: a call of
# FBGEMM costs 12 us on all threads, 1 us on one. With a limit of 2^22, whole runs were slower.
_ALONE = 2**21
# Most elements packed per call: from 2^25 on, packing an element takes 40 ns instead of 10 ns.
_PACKED_AT_ONCE = 2**23


class HalfLinear:
    """x W^T by FBGEMM, with a float32 weight W stored in float16: half as many bytes to read.

    Most checkpoints are bfloat16, which has 8 significant bits; float16 has 11. The smaller range
    of float16 suffices if the weight is first multiplied by a power of two.

    `holds` must accept the weight [N, K]. Inputs are multiplied by `scale` [K] float32, if given.
    Products of up to `rows_alone` rows run on one thread. For more than `most_rows` rows the caller
    should use oneDNN; `most_rows` is infinite for weights that are kept in float16 only.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None) -> None:
        factor = _power_of_two(weight)
        self.most_rows, self.rows_alone = math.inf, 0
        if weight.numel() <= _HALF_BESIDE:
            shared = torch.get_num_threads() > 1
            self.most_rows = _MOST_ROWS
            self.rows_alone = _ALONE // weight.numel() if shared else _MOST_ROWS
        # `factor` is a power of two, so multiplying inputs by 1 / factor is exact.
        self._inverse = 1.0 / factor
        self._scale: Tensor | float = self._inverse if scale is None else scale * self._inverse
        scaled = weight * factor
        if self.rows_alone:
            with warnings.catch_warnings():
                # torch warns at the first call of either function that the function is deprecated.
                warnings.simplefilter("ignore")
                self._packed = torch.fbgemm_pack_gemm_matrix_fp16(scaled)
                self._multiply = torch.fbgemm_linear_fp16_weight_fp32_activation
                self._multiply(weight[:1], self._packed, None)
        if self.rows_alone < self.most_rows:
            pack, rows = torch.ops.quantized.linear_prepack_fp16, _PACKED_AT_ONCE // weight.shape[1]
            self._shared = [pack(part, None) for part in torch.split(scaled, max(1, rows))]
            self._multiply_shared = torch.ops.quantized.linear_dynamic_fp16

    @staticmethod
    def holds(weight: Tensor) -> bool:
        """Whether torch has the float16 operators, and float16 can hold each element exactly."""
        pack, multiply = "fbgemm_pack_gemm_matrix_fp16", "fbgemm_linear_fp16_weight_fp32_activation"
        shared = ("linear_prepack_fp16", "linear_dynamic_fp16")
        if (
            torch.backends.quantized.engine not in ("fbgemm", "x86")
            or not all(hasattr(torch, name) for name in (pack, multiply))
            or not all(hasattr(torch.ops.quantized, name) for name in shared)
        ):
            return False
        factor = _power_of_two(weight)
        # The check takes 4096 rows at a time, since it makes three copies of the rows.
        scaled = (part * factor for part in torch.split(weight, 4096))
        return all(bool(p.isfinite().all()) and torch.equal(p.half().float(), p) for p in scaled)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T [T, N] for x [T, K]."""
        return self._times(x * self._scale)

    def added(self, x: Tensor, total: Tensor) -> Tensor:
        """Return total + x W^T, with total [T, N]."""
        if isinstance(self._scale, Tensor):
            return total + self(x)
        return torch.add(total, self._times(x), alpha=self._inverse)

    def _times(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self.rows_alone:
            return self._multiply(x, self._packed, None)
        parts: list[Tensor] = [self._multiply_shared(x, part) for part in self._shared]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _power_of_two(weight: Tensor) -> float:
    """Return the power of two that scales the largest absolute element into [2^14, 2^15)."""
    largest = max(float(-weight.min()), float(weight.max()))
    # The limit of 100 avoids overflow at 2^128. Only for weights below 2^-86 does the limit matter.
    return 2.0 ** min(100, 15 - math.frexp(largest)[1]) if math.isfinite(largest) else 1.0
