"""Products of a few rows with a float32 weight on a CPU, where reading the weight is what costs."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

# Of weights of up to this many elements a copy in float16 is kept beside oneDNN's. Larger ones are
# in float16 alone, for any number of rows, half the memory: [6144, 1024] takes 0.42 of oneDNN's
# time at 1 row, 0.68 at 8, 0.99 at 32, 1.16 from 512 on; [1024, 3072] 0.44, 0.70, 1.07 and 1.08.
_HALF_BESIDE = 2**20
# Rows up to which FBGEMM is ahead of oneDNN with one thread and with two, for every weight of the
# shipped model: 0.75 to 0.95 of the time at 32 and at 48 rows, 0.83 to 1.0 at 64.
_MOST_ROWS = 64
# A call that FBGEMM divides over threads costs 12 us and their meeting, one by this thread alone 1.
# Up to this many multiplications it is faster alone: [256, 256] up to 20 rows, [512, 256] up to
# 12, [1536, 256] up to 6. (2^22 made whole runs slower.)
_ALONE = 2**21
# Elements that are packed at once. Packing takes 10 ns an element, 40 from 2^25 elements on.
_PACKED_AT_ONCE = 2**23


class HalfLinear:
    """x W^T by FBGEMM, of a weight that float16 holds without loss: half the bytes are read.

    Most checkpoints are bfloat16, which has 8 significant bits. float16 has 11, and its smaller
    range suffices if the weight is multiplied by a power of two first. FBGEMM converts to float32
    in registers and computes as with the float32 weight.

    Args:
        weight: [N, K] float32 that `holds` accepts.
        scale: [K] float32 factors of the inputs; None for none.

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
                # Packing and the first product warn, once per process, that they are deprecated.
                # A torch without them makes `holds` False.
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
        """Whether torch has what this takes, and no element is rounded."""
        needed = (
            (torch, "fbgemm_pack_gemm_matrix_fp16"),
            (torch, "fbgemm_linear_fp16_weight_fp32_activation"),
            (torch.ops.quantized, "linear_prepack_fp16"),
            (torch.ops.quantized, "linear_dynamic_fp16"),
        )
        if torch.backends.quantized.engine not in ("fbgemm", "x86"):
            return False
        if not all(hasattr(module, name) for module, name in needed):
            return False
        factor = _power_of_two(weight)
        # In parts, without three copies of a large weight.
        scaled = (part * factor for part in torch.split(weight, 4096))
        return all(
            bool(part.isfinite().all()) and torch.equal(part.half().float(), part)
            for part in scaled
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        return self._times(x * self._scale)

    def added(self, x: Tensor, total: Tensor) -> Tensor:
        """total [T, N] + x W^T."""
        if isinstance(self._scale, Tensor):
            return total + self(x)
        return torch.add(total, self._times(x), alpha=self._inverse)

    def _times(self, x: Tensor) -> Tensor:
        """The product with the scaled weight."""
        if x.shape[0] <= self.rows_alone:
            return self._multiply(x, self._packed, None)
        parts: list[Tensor] = [self._multiply_shared(x, part) for part in self._shared]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _power_of_two(weight: Tensor) -> float:
    """The factor that brings the largest element to between 2^14 and 2^15."""
    largest = max(float(-weight.min()), float(weight.max()))
    # Beyond 100 nothing is that small, and the factor would leave float32.
    return 2.0 ** min(100, 15 - math.frexp(largest)[1]) if math.isfinite(largest) else 1.0
