"""SiLU(gate) * up, the gate of a SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202)."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, x_stride, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + size + cols, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * size + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(
    gate_up: torch.Tensor, *, out: torch.Tensor | None = None, pdl: bool = False
) -> torch.Tensor:
    """Return ``silu(gate_up[:, :I]) * gate_up[:, I:]`` as [T, I] for ``gate_up`` [T, 2I].

    Float32 inside, one rounding. ``out`` must be contiguous. ``pdl`` launches with programmatic
    dependent launch (compute capability 9.0 and later).
    """
    if gate_up.dim() != 2 or gate_up.stride(1) != 1 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2I] with contiguous rows: {tuple(gate_up.shape)}")
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    # 1024 columns and 4 warps: one 16-byte load of each half a thread.
    block = min(1024, triton.next_power_of_2(size))
    if tokens:
        _silu_mul_kernel[(tokens, triton.cdiv(size, block))](
            *(gate_up, out, gate_up.stride(0), size),
            BLOCK=block,
            PDL=pdl,
            num_warps=4,
            launch_pdl=pdl,
        )
    return out


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Plain torch version of :func:`silu_mul`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
