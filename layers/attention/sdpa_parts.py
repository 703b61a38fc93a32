"""How much of a step one SDPA call of `layers.attention.torch_sdpa` computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Maximum number of query rows for which a mask exists at once. For 256 query rows and 131,072 cache
# rows, the mask and the float32 copy that SDPA makes of it take 168 MB.
QUERY_ROWS = 256

# Decodes of which one has more than twice the length of another are in one group only if padding
# takes at most this number of bytes: gathering as many takes about as long as a further call.
PADDING = 1 << 19
# Maximum number of cache rows that a group of several decodes gathers. In float32, with 8 KV heads
# of 128 elements, their K and V take 512 MB.
CACHE_ROWS = 1 << 16


def decode_groups(lengths: list[int], row_bytes: int) -> list[list[int]]:
    """Return groups of decodes that see similar numbers of cache rows, as indices of `lengths`.

    K and V of all decodes of a group are padded to the group's largest length. `row_bytes` is the
    size of K and V of one cache row.
    """
    groups, longest, padding = list[list[int]](), 0, 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if 2 * lengths[i] <= longest:
            padding += (longest - lengths[i]) * row_bytes
        if not groups or padding > PADDING or (len(groups[-1]) + 1) * longest > CACHE_ROWS:
            groups.append([])
            longest, padding = lengths[i], 0
        groups[-1].append(i)
    return groups


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, window: int | None, scale: float
) -> Tensor:
    """Return causal attention of the last n tokens of L, [1, heads, n, head_dim].

    Args:
        q: [1, heads, n, head_dim].
        k, v: [1, KV heads, L, head_dim].
        columns: the numbers from 0 to at least L - 1, int64.
        window: see `AttentionBatch`.
    """
    n, length, parts = q.shape[2], k.shape[2], []
    for start in range(length - n, length, QUERY_ROWS):
        end = min(start + QUERY_ROWS, length)
        begin = max(0, start - window + 1) if window else 0
        others, own = columns[begin:end], columns[start:end].unsqueeze(1)
        mask = others <= own
        if window:
            mask &= others > own - window
        part = F.scaled_dot_product_attention(
            q[:, :, start - length + n : end - length + n],
            k[:, :, begin:end],
            v[:, :, begin:end],
            attn_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] > k.shape[1],
        )
        parts.append(part)
    return torch.cat(parts, dim=2)
