"""Matrix products on a CPU: float32 inputs times weights that float16 can hold exactly.

The library FBGEMM multiplies by a float16 copy of a weight, oneDNN by a float32 copy. A weight of
at most 2^20 elements is *small* and has both copies. A larger weight has only the float16 copy.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

# Maximum number of elements of a small weight. For a weight [6144, 1024] FBGEMM takes 0.42 times as
# long as oneDNN for 1 input row, and 1.16 times as long for 512 input rows or more.
_HALF_BESIDE = 2**20
# Small weights use FBGEMM for up to 64 input rows. For 64 input rows FBGEMM takes 0.83 to 1.0
# times as long as oneDNN.
_MOST_ROWS = 64
# Products with small weights and at most 2^21 multiplications run on one thread, because a call has
# 12 us of overhead on all threads and 1 us on one. With 2^22 instead of 2^21 the engine was slower.
_ALONE = 2**21
# Maximum number of weight elements that FBGEMM packs (copies to its float16 layout) in a call. With
# 2^25 instead of 2^23, packing an element takes 40 ns instead of 10 ns.
_PACKED_AT_ONCE = 2**23


class HalfLinear:
    """Computes x W^T by FBGEMM. W is stored in float16, half as many bytes to read as float32.

    Most checkpoints are bfloat16, which has 8 significant bits; float16 has 11. The smaller range
    of float16 suffices if the weight is first multiplied by a power of two. The constructor takes a
    float32 weight [N, K] for which `holds` is true. If `scale`, float32 [K], is given, inputs are
    multiplied by `scale`. Products of at most `rows_alone` input rows run on one thread. Callers
    should use oneDNN for more than `most_rows` input rows; `most_rows` may be infinite.
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
                # Both FBGEMM functions below warn at their first call that they are deprecated.
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
        """Return whether torch has FBGEMM's functions and float16 can hold the weight exactly."""
        pack, multiply = "fbgemm_pack_gemm_matrix_fp16", "fbgemm_linear_fp16_weight_fp32_activation"
        shared = ("linear_prepack_fp16", "linear_dynamic_fp16")
        if (
            torch.backends.quantized.engine not in ("fbgemm", "x86")
            or not all(hasattr(torch, name) for name in (pack, multiply))
            or not all(hasattr(torch.ops.quantized, name) for name in shared)
        ):
            return False
        factor = _power_of_two(weight)
        # Only 4096 rows are checked at a time, since the check makes three copies of the rows.
        scaled = (part * factor for part in torch.split(weight, 4096))
        return all(bool(p.isfinite().all()) and torch.equal(p.half().float(), p) for p in scaled)

    def __call__(self, x: Tensor) -> Tensor:
        return self._times(x * self._scale)

    def added(self, x: Tensor, total: Tensor) -> Tensor:
        """Return total + x W^T for x [T, K] and total [T, N]."""
        if isinstance(self._scale, Tensor):
            return total + self(x)
        return torch.add(total, self._times(x), alpha=self._inverse)

    def _times(self, x: Tensor) -> Tensor:
        # A step without sampled rows has 0 rows, also for a weight that is never multiplied alone.
        if self.rows_alone and x.shape[0] <= self.rows_alone:
            return self._multiply(x, self._packed, None)
        parts: list[Tensor] = [self._multiply_shared(x, part) for part in self._shared]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _power_of_two(weight: Tensor) -> float:
    """Return the power of two that scales the largest absolute weight into [2^14, 2^15)."""
    largest = max(float(-weight.min()), float(weight.max()))
    # The power is at most 2^100, since float32 overflows at 2^128. If all elements of `weight` are
    # below 2^-86, the scaled weights stay below 2^14.
    return 2.0 ** min(100, 15 - math.frexp(largest)[1]) if math.isfinite(largest) else 1.0
