"""Descriptors of matrices for TMA (Tensor Memory Accelerator), the copy unit of Hopper GPUs."""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe a matrix, of which one copy has so many rows and columns."""
    layout = _layout(rows, columns, matrix.dtype)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


# To find a layout takes a CPU 4.5 us, more than twice as long as the rest of a descriptor, and a
# step makes three descriptors for each product.
@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([rows, columns], kind)
