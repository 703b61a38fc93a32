"""Products of a few rows with a float32 weight on a CPU, where reading the weight is what costs."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor

# FBGEMM reads a weight with one thread here. Up to this many elements that is as fast as two
# threads of oneDNN whose call alone takes 13 us, against 2 us; a larger one is left to all threads.
_HALF_WEIGHT = 2**20
# MKL is ahead of oneDNN for one row up to this size: 9 us against 14 for [256, 256], 15 against
# 22 for [512, 256]; from [256, 768] on oneDNN is ahead.
_MKL_WEIGHT = 2**17
# Rows up to which FBGEMM is ahead, times the threads of oneDNN: 32 rows of [1024, 256], [256, 768]
# take 0.85 to 0.9 of the time of one thread, and whole steps against two threads are 1.19 times as
# fast at 9 rows, 1.13 at 12, 1.08 at 16, the same at 20. [4096, 256] against two threads: the same
# at 10, 0.97 at 16. 8 rows are ahead of two threads (0.59 to 0.94 of the time); more threads were
# not measured.
_ROWS_TIMES_THREADS, _ALWAYS_ROWS = 32, 8
_LARGE_WEIGHT, _LARGE_ROWS_TIMES_THREADS = 2**19, 16


class FewRows(ABC):
    """x W^T for up to `most_rows` rows of x.

    Attributes:
        most_rows: from one more on, oneDNN's layout is faster.
    """

    most_rows: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [T, N] + x W^T."""
        return residual + self(x)


class MKLColumns(FewRows):
    """One row by MKL, W^T being contiguous.

    Args:
        weight: [N, K].
    """

    most_rows = 1

    def __init__(self, weight: Tensor) -> None:
        self._columns = weight.t().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self._columns)


class HalfWeight(FewRows):
    """A weight that float16 holds without loss, so that only half as many bytes are read.

    Checkpoints are bfloat16 as a rule: 8 significant bits, of which float16 has 11, and its
    smaller range suffices if the weight is multiplied by a power of two first. FBGEMM makes
    float32 of it in registers and computes as with the float32 weight.

    Args:
        weight: [N, K] float32, one that `holds` float16 without loss.
        scale: [K] float32 factors of the inputs; None for none.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None) -> None:
        large = weight.numel() > _LARGE_WEIGHT
        limit = _LARGE_ROWS_TIMES_THREADS if large else _ROWS_TIMES_THREADS
        self.most_rows = max(_ALWAYS_ROWS, limit // torch.get_num_threads())
        factor = _power_of_two(weight)
        # Powers of two lose nothing on the way back either.
        self._inverse = 1.0 / factor
        self._scale: Tensor | float = self._inverse if scale is None else scale * self._inverse
        with warnings.catch_warnings():
            # Packing and the first product warn, once per process, that they will be removed;
            # without them `holds` is False.
            warnings.simplefilter("ignore")
            self._packed = torch.fbgemm_pack_gemm_matrix_fp16(weight * factor)
            self._multiply = torch.fbgemm_linear_fp16_weight_fp32_activation
            self._multiply(weight[:1], self._packed, None)

    @staticmethod
    def holds(weight: Tensor) -> bool:
        """Whether torch has what this takes, and no element is rounded."""
        needed = ("fbgemm_pack_gemm_matrix_fp16", "fbgemm_linear_fp16_weight_fp32_activation")
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            return False
        if not all(hasattr(torch, name) for name in needed):
            return False
        scaled = weight * _power_of_two(weight)
        half = scaled.half()
        return bool(half.isfinite().all()) and torch.equal(half.float(), scaled)

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x * self._scale, self._packed, None)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        if isinstance(self._scale, Tensor):
            return super().added(x, residual)
        return torch.add(residual, self._multiply(x, self._packed, None), alpha=self._inverse)


def few_rows(weight: Tensor, scale: Tensor | None) -> FewRows | None:
    """The fastest means for a float32 weight [N, K] and factors of its inputs; None: oneDNN is."""
    if weight.numel() <= _HALF_WEIGHT and HalfWeight.holds(weight):
        return HalfWeight(weight, scale)
    if weight.numel() <= _MKL_WEIGHT:
        return MKLColumns(weight if scale is None else weight * scale)
    return None


def _power_of_two(weight: Tensor) -> float:
    """The factor that brings the largest element to between 2^14 and 2^15."""
    largest = float(weight.abs().max())
    # Beyond 100 nothing is that small, and the factor would leave float32.
    return 2.0 ** min(100, 15 - math.frexp(largest)[1]) if math.isfinite(largest) else 1.0
