"""Causal attention of many new tokens per sequence over a paged KV cache (the prefill step).

A program (thread block) computes the attention of a tile of queries in one pass over their keys
(FlashAttention-2, Dao 2023). A row of the tile is the query of one new token in one query head. The
query heads of a tile share one KV head, so K and V are loaded once for all rows. Programs read the
sequences' lengths from device memory. So a CUDA graph serves all batches that have the same number
of sequences and the same total of new tokens.

attention_parts.py defines the result to the bit. `hopper_prefill` is the kernel for Hopper GPUs;
the kernel of this module gives the same bits, and is used where the other is not possible.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from layers.kernels.attention_parts import (
    EMPTY,
    LOG2_E,
    SPLIT,
    finish,
    fold_values,
    fold_weights,
    split_weights,
)
from layers.kernels.launch import has_wgmma
from memory.kv_cache import KVLayer


@dataclass(frozen=True)
class PrefillConfig:
    """Compile and launch options of the kernel in this module."""

    rows: int  # number of queries in a tile, one for each new token and query head
    warps: int
    stages: int


MEDIUM_HEAD = PrefillConfig(rows=64, warps=4, stages=2)
LARGE_HEAD = PrefillConfig(rows=64, warps=8, stages=1)  # used if head_dim > 128; not tuned


@triton.jit(
    do_not_specialize=["batch"],
    do_not_specialize_on_alignment=["table_ptr", "slot_ptr", "start_ptr", "len_ptr"],
)
def _paged_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    slot_ptr,
    start_ptr,
    len_ptr,
    out_ptr,
    scale,
    batch,
    strides,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,  # SPLIT
    BATCH_PAD: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: full attention
):
    q_row, q_head, page_stride, token_stride, head_stride, table_row, out_row, out_head = strides
    DIM_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    head, place = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    lane = tl.arange(0, BATCH_PAD)
    begins = tl.load(start_ptr + lane, mask=lane < batch, other=0)
    lens = tl.load(start_ptr + lane + 1, mask=lane < batch, other=0) - begins
    ends = tl.cumsum(tl.cdiv(lens * GROUP, ROWS), 0)
    seq = tl.sum((ends <= place).to(tl.int32), 0)
    if seq >= batch:
        return
    q_begin = tl.sum(tl.where(lane == seq, begins, 0), 0)
    q_len = tl.sum(tl.where(lane == seq, lens, 0), 0)
    # A sequence's last tile attends to the most keys, so the program that starts first computes it.
    first_row = (tl.sum(tl.where(lane == seq, ends, 0), 0) - 1 - place) * ROWS
    num_tokens = tl.load(len_ptr + seq)
    table = table_ptr + tl.load(slot_ptr + seq).to(tl.int64) * table_row

    rows, dims = first_row + tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    token, heads = rows // GROUP, head * GROUP + rows % GROUP
    ok = (rows < q_len * GROUP)[:, None] & (dims < DIM)[None, :]
    q_at = q_ptr + ((q_begin + token).to(tl.int64) * q_row + heads * q_head)[:, None]
    q = tl.load(q_at + dims[None, :], mask=ok, other=0.0)  # [ROWS, DIM_PAD]

    before = num_tokens - q_len
    # Rows after the last query use its position, so that they attend to existing tokens only.
    positions = before + tl.minimum(token, q_len - 1)
    all_see = (before + first_row // GROUP + 1) // TILE * TILE
    last_token = tl.minimum((first_row + ROWS - 1) // GROUP, q_len - 1)
    last_end = tl.cdiv(before + last_token + 1, TILE) * TILE
    k_ptr += head * head_stride
    v_ptr += head * head_stride
    t_top, t_norm = tl.full([ROWS], EMPTY, tl.float32), tl.zeros([ROWS], tl.float32)
    t_acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    if WINDOW:
        # Tokens before `first_seen` are not loaded, since their pages may be those of others.
        first_seen = tl.maximum(before + first_row // GROUP - WINDOW + 1, 0)
        # The first split whose keys all lie in the windows of all rows.
        windows_begin = tl.maximum(before + last_token - WINDOW + 1, 0)
        whole = tl.minimum(tl.cdiv(windows_begin, TILE) * TILE, last_end)
    for part in tl.static_range(3 if WINDOW else 2):
        # Splits that begin before a window, splits that all rows see, and splits at the end.
        if WINDOW:
            begin = first_seen // TILE * TILE if part == 0 else whole
            end = whole if part == 0 else all_see
            if part == 2:
                begin, end = tl.maximum(all_see, whole), last_end
        else:
            begin = all_see if part == 1 else 0
            end = last_end if part == 1 else all_see
        for at in tl.range(begin, end, TILE):
            tokens = at + tl.arange(0, TILE)
            there = tokens < num_tokens
            if WINDOW:
                there = there & (tokens >= first_seen)
            ids = tl.load(table + tokens // PAGE, mask=there, other=0)
            row = ids.to(tl.int64) * page_stride + tokens % PAGE * token_stride
            where = row[:, None] + dims[None, :]
            # V of a token that no row sees has weight 0 but may be NaN. Zero it: 0 * NaN is NaN.
            seen = there[:, None] & (dims < DIM)[None, :]
            k = tl.load(k_ptr + where, mask=seen, other=0.0)
            v = tl.load(v_ptr + where, mask=seen, other=0.0)
            s = tl.dot(q, tl.trans(k))  # [ROWS, TILE]
            # All rows see all keys in part 1 with a window, and in part 0 without one.
            if (part == 1) != (WINDOW > 0):
                visible = positions[:, None] >= tokens[None, :]
                if WINDOW:
                    visible = visible & (positions[:, None] - WINDOW < tokens[None, :])
                s = tl.where(visible, s, float("-inf"))
            p, norm, top = split_weights(s, scale)
            acc = tl.dot(p.to(v.dtype), v)
            a, b, t_norm, t_top = fold_weights(t_norm, t_top, norm, top)
            t_acc = fold_values(t_acc, a[:, None], b[:, None], acc)
    result = finish(t_acc, t_norm[:, None])
    out_at = out_ptr + ((q_begin + token).to(tl.int64) * out_row + heads * out_head)[:, None]
    tl.store(out_at + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=ok)


def paged_prefill(
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
    config: PrefillConfig | None = None,
) -> Tensor:
    """Compute causal attention of the newest tokens of P sequences; return `out`.

    Sequence p has `context_lens[p]` tokens, and `kv` must already hold K and V of all these tokens.
    Rows `query_start[p]:query_start[p + 1]` of `q` are the queries of the sequence's new tokens.

    Args:
        q, out: [rows, query heads, head_dim]. Rows from `query_start[P]` on are not accessed.
        slots, context_lens: int32 [P]; see `paged_decode` for these and for arguments not listed.
        query_start: int32 [P + 1], ascending; entries p and p + 1 are equal if p has no new tokens.
        window: if not None, a token attends to itself and the `window` - 1 tokens before it only.
            Neither table entries nor pages of tokens before all windows are read.
    """
    (rows, num_heads, dim), (_, page, kv_heads, _) = q.shape, kv.k.shape
    group, batch = num_heads // kv_heads, slots.numel()
    if config is None and q.is_cuda and has_wgmma(q.device):
        from layers.kernels.prefill_launch import fits_hopper, hopper_prefill

        if fits_hopper(q, kv):
            where = q, kv, block_tables, slots, query_start, context_lens
            return hopper_prefill(*where, scale=scale, out=out, window=window)
    if config is None:
        config = LARGE_HEAD if dim > 128 else MEDIUM_HEAD
    # Each sequence's last tile may be partly empty, so up to `batch` more tiles are needed.
    tiles = triton.cdiv(rows * group, config.rows) + batch
    batch_pad = 32 if batch <= 32 else max(256, triton.next_power_of_2(batch))  # few variants
    _paged_prefill_kernel[(kv_heads * tiles,)](
        *(q, kv.k, kv.v, block_tables, slots, query_start, context_lens, out),
        *(scale * LOG2_E, batch),
        (*q.stride()[:2], *kv.k.stride()[:3], block_tables.stride(0), *out.stride()[:2]),
        *(kv_heads, group, dim, page, config.rows, SPLIT, batch_pad, window or 0),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
