"""The matrix product of float32 rows and a weight that float16 holds exactly, on a CPU."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

# Weights of more elements are in float16 alone, for half the memory, others beside oneDNN's layout.
# [6144, 1024] takes 0.42 of oneDNN's time at 1 row and 1.16 from 512 on.
_HALF_BESIDE = 2**20
# Rows up to which FBGEMM is ahead of oneDNN: 0.83 to 1.0 of its time at 64.
_MOST_ROWS = 64
# Up to this many multiplications one thread alone is faster: a call that FBGEMM divides over
# threads costs 12 us, another 1. (2^22 made whole runs slower.)
_ALONE = 2**21
# Elements packed at once: from 2^25 on an element takes 40 ns instead of 10.
_PACKED_AT_ONCE = 2**23


class HalfLinear:
    """x W^T by FBGEMM, of a float32 weight that float16 holds without loss: half the bytes to read.

    Most checkpoints are bfloat16, with 8 significant bits of float16's 11. The smaller range of
    float16 suffices if the weight is multiplied by a power of two first.

    `holds` must accept the weight [N, K]. The inputs are multiplied by `scale` [K] float32.

    Attributes:
        most_rows: rows up to which this is faster than oneDNN, or infinite to save its memory.
        rows_alone: up to so many rows are multiplied by the calling thread alone.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None) -> None:
        factor = _power_of_two(weight)
        self.most_rows, self.rows_alone = math.inf, 0
        if weight.numel() <= _HALF_BESIDE:
            shared = torch.get_num_threads() > 1
            self.most_rows = _MOST_ROWS
            self.rows_alone = _ALONE // weight.numel() if shared else _MOST_ROWS
        # Powers of two lose nothing on the way back either.
        self._inverse = 1.0 / factor
        self._scale: Tensor | float = self._inverse if scale is None else scale * self._inverse
        scaled = weight * factor
        if self.rows_alone:
            with warnings.catch_warnings():
                # Packing and the first product warn, once, that they are deprecated.
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
        """Whether torch has the float16 operators, and float16 holds each element exactly."""
        pack, multiply = "fbgemm_pack_gemm_matrix_fp16", "fbgemm_linear_fp16_weight_fp32_activation"
        shared = ("linear_prepack_fp16", "linear_dynamic_fp16")
        if (
            torch.backends.quantized.engine not in ("fbgemm", "x86")
            or not all(hasattr(torch, name) for name in (pack, multiply))
            or not all(hasattr(torch.ops.quantized, name) for name in shared)
        ):
            return False
        factor = _power_of_two(weight)
        # In parts, without three copies of a large weight.
        scaled = (part * factor for part in torch.split(weight, 4096))
        return all(bool(p.isfinite().all()) and torch.equal(p.half().float(), p) for p in scaled)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        return self._times(x * self._scale)

    def added(self, x: Tensor, total: Tensor) -> Tensor:
        """total [T, N] + x W^T."""
        if isinstance(self._scale, Tensor):
            return total + self(x)
        return torch.add(total, self._times(x), alpha=self._inverse)

    def _times(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self.rows_alone:
            return self._multiply(x, self._packed, None)
        parts: list[Tensor] = [self._multiply_shared(x, part) for part in self._shared]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _power_of_two(weight: Tensor) -> float:
    """The factor that brings the largest element to between 2^14 and 2^15."""
    largest = max(float(-weight.min()), float(weight.max()))
    # Beyond 100 nothing is that small, and the factor would leave float32.
    return 2.0 ** min(100, 15 - math.frexp(largest)[1]) if math.isfinite(largest) else 1.0
