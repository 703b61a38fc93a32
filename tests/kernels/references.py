"""What the kernels compute, in plain torch: arguments and results are those of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.rotary import Rotation
from memory.kv_cache import KVLayer


def paged_prefill_reference(
    q: Tensor,
    kv: KVLayer,
    block_tables: Tensor,
    slots: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    out: Tensor,
    window: int | None = None,
) -> Tensor:
    """`paged_prefill` in plain torch and float32, one sequence at a time."""
    _, page, kv_heads, _ = kv.k.shape
    starts = query_start.tolist()
    for p, (slot, length) in enumerate(zip(slots.tolist(), context_lens.tolist(), strict=True)):
        begin, end = starts[p], starts[p + 1]
        known = torch.arange(length, device=q.device)
        if window is not None:
            known = known[max(0, length - (end - begin) - window + 1) :]
        rows = block_tables[slot, known // page].long(), known % page
        keys, values = (
            cache[rows].float().repeat_interleave(q.shape[1] // kv_heads, 1)
            for cache in (kv.k, kv.v)
        )
        scores = torch.einsum("qhd,thd->hqt", q[begin:end].float(), keys) * scale
        positions = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        hidden = known[None, :] > positions
        if window is not None:
            hidden |= known[None, :] <= positions - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        weights = weights.masked_fill(hidden, 0.0)  # padding sees nothing: its softmax is NaN
        out[begin:end] = torch.einsum("hqt,thd->qhd", weights, values).to(out.dtype)
    return out


def paged_decode_reference(
    q: Tensor,
    kv: KVLayer,
    block_tables: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    out: Tensor,
    rows_per_request: int = 1,
    window: int | None = None,
) -> Tensor:
    """`paged_decode` in plain torch and float32: a prefill of the newest tokens."""
    start = torch.arange(0, q.shape[0] + 1, rows_per_request)
    where = (block_tables, slots, start, context_lens)
    return paged_prefill_reference(q, kv, *where, scale=scale, out=out, window=window)


def qk_norm_rope_store_reference(
    qkv: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    rotation: Rotation,
    slot_mapping: Tensor,
    kv: KVLayer,
) -> Tensor:
    """Plain torch version of :func:`qk_norm_rope_store`; it too writes into the caches."""
    _, block_size, kv_heads, dim = kv.k.shape
    heads = qkv.view(qkv.shape[0], -1, dim)
    qk, value = heads[:, :-kv_heads].float(), heads[:, -kv_heads:]
    q_heads = qk.shape[1] - kv_heads
    if weights is not None:
        qk = qk * torch.rsqrt(qk.square().mean(-1, keepdim=True) + eps)
        qk = qk * torch.stack([weights[0]] * q_heads + [weights[1]] * kv_heads).float()
    at = rotation.positions.long()
    cos, sin = rotation.cos[at].unsqueeze(1), rotation.sin[at].unsqueeze(1)
    a, b = qk.chunk(2, dim=-1)
    qk = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(kv.k.dtype)
    kept = slot_mapping >= 0
    slots = slot_mapping[kept].long()
    where = (slots // block_size, slots % block_size)
    kv.k[where] = qk[kept, q_heads:]
    kv.v[where] = value[kept].to(kv.v.dtype)
    return qk[:, :q_heads]


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    part: Tensor | None = None,
    post: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain torch version of :func:`rms_norm`."""
    if part is not None:
        if part.dim() == 3:
            first = part[0] + part[1]
            part = (first if len(part) == 2 else first + (part[2] + part[3])).to(x.dtype)
        if post is not None:
            part = rms_norm_reference(part, *post)[0]
        x = (part.float() + x.float()).to(x.dtype)
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.float()).to(x.dtype), x


def gate_mul_reference(gate_up: Tensor, gate: str = "silu") -> Tensor:
    """Plain torch version of :func:`gate_mul`."""
    g, up = gate_up.float().chunk(2, dim=-1)
    y = g * torch.sigmoid(g) if gate == "silu" else F.gelu(g, approximate="tanh")
    return (y * up).to(gate_up.dtype)


def product_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gate: str | None = None
) -> Tensor:
    """What `products.multiply` computes of normed inputs, in float32 with one rounding."""
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return (gate_mul_reference(y, gate) if gate else y).to(x.dtype)
