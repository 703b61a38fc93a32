"""Causal attention of many new tokens per sequence over a paged KV cache (the prefill step).

The algorithm is FlashAttention-2 (Dao 2023): a program (thread block) computes the attention of a
tile of queries in one pass over their keys, with an online softmax. A row of the tile is the query
of one new token in one query head. The query heads of a tile share one KV head, so K and V are
loaded once for all rows. Programs read the sequences' lengths from device memory. So a CUDA graph
serves all batches that have the same number of sequences and the same total of new tokens.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memory.kv_cache import KVLayer

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class PrefillConfig:
    """Compile and launch options of `paged_prefill` (TMA: Tensor Memory Accelerator)."""

    rows: int  # number of queries in a tile, one for each new token and query head
    tile: int  # number of keys that a program reads in one loop iteration
    warps: int
    stages: int
    max_registers: int | None = None
    tma: bool = True  # whether to load K and V by TMA if the page size and head_dim allow it


# Figures are for an H200, bf16 and head_dim 128; "16/8 heads" means 16 query and 8 KV heads. For 4
# sequences of 4,096 tokens with 16/8 heads, WIDE reaches 438 TFLOP/s without TMA, 478 with TMA.
# 478 TFLOP/s is 0.60 times the rate of a product of two 8192 x 8192 matrices.
WIDE = PrefillConfig(rows=128, tile=64, warps=8, stages=2, max_registers=128)
# NARROW is used if a batch's queries fill fewer than WIDE_TILES tiles of WIDE. A prompt of 1,024
# tokens with 16/8 heads takes 20 us with NARROW and 30 us with WIDE. NARROW does not use TMA, since
# the host takes 17 us longer to launch a kernel with TMA. With TMA, NARROW would be no faster for
# 16/8 heads. For 1,024 tokens and 12/2 heads NARROW takes 19.7 us, and would take 16.7 us with TMA.
NARROW = PrefillConfig(rows=64, tile=64, warps=4, stages=3, tma=False)
WIDE_TILES = 256
LARGE_HEAD = PrefillConfig(rows=64, tile=32, warps=4, stages=2)  # used if head_dim > 128; not tuned


@triton.jit(
    do_not_specialize=["batch"],
    do_not_specialize_on_alignment=["table_ptr", "slot_ptr", "start_ptr", "len_ptr"],
)
def _paged_prefill_kernel(
    q_ptr,
    k_src,
    v_src,
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
    TILE: tl.constexpr,
    TMA: tl.constexpr,
    BATCH_PAD: tl.constexpr,
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
    if not TMA:
        k_src += head * head_stride
        v_src += head * head_stride
    top, norm = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for masked in tl.static_range(2):
        begin = all_see if masked else 0
        end = last_end if masked else all_see
        offsets = tl.arange(0, TILE)
        page = tl.load(table + begin // PAGE, mask=begin < end, other=0)
        for at in tl.range(begin, end, TILE):
            tokens = at + offsets
            if TMA:
                row = at % PAGE
                k = k_src.load([page, row, head, 0]).reshape(TILE, DIM_PAD)
                v = v_src.load([page, row, head, 0]).reshape(TILE, DIM_PAD)
                page = tl.load(table + (at + TILE) // PAGE, mask=at + TILE < end, other=0)
                if masked:
                    # V after the last token has weight 0 but may be NaN. Zero it: 0 * NaN is NaN.
                    v = tl.where((tokens < num_tokens)[:, None], v, 0.0)
            else:
                if PAGE % TILE == 0:
                    base = page.to(tl.int64) * page_stride + at % PAGE * token_stride
                    page = tl.load(table + (at + TILE) // PAGE, mask=at + TILE < end, other=0)
                    where = offsets[:, None] * token_stride + dims[None, :]
                    k_at, v_at = k_src + base + where, v_src + base + where
                else:
                    ids = tl.load(table + tokens // PAGE, mask=tokens < num_tokens, other=0)
                    row = ids.to(tl.int64) * page_stride + tokens % PAGE * token_stride
                    where = row[:, None] + dims[None, :]
                    k_at, v_at = k_src + where, v_src + where
                if masked:
                    seen = (tokens < num_tokens)[:, None] & (dims < DIM)[None, :]
                    k = tl.load(k_at, mask=seen, other=0.0)
                    v = tl.load(v_at, mask=seen, other=0.0)
                elif DIM != DIM_PAD:
                    k = tl.load(k_at, mask=(dims < DIM)[None, :], other=0.0)
                    v = tl.load(v_at, mask=(dims < DIM)[None, :], other=0.0)
                else:
                    k = tl.load(k_at)
                    v = tl.load(v_at)
            s = tl.dot(q, tl.trans(k))  # [ROWS, TILE]
            if masked:
                s = tl.where(positions[:, None] >= tokens[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new_top[:, None])
            keep = tl.exp2(top - new_top)
            norm = norm * keep + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
            top = new_top
    result = acc / norm[:, None]
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
    config: PrefillConfig | None = None,
) -> Tensor:
    """Compute causal attention of the newest tokens of P sequences; return `out`.

    Sequence p has `context_lens[p]` tokens, and `kv` must already hold K and V of all these tokens.
    Rows `query_start[p]:query_start[p + 1]` of `q` are the queries of the sequence's new tokens.

    Args:
        q, out: [rows, query heads, head_dim]. Rows from `query_start[P]` on are not accessed.
        slots, context_lens: int32 [P]; see `paged_decode` for these and for arguments not listed.
        query_start: int32 [P + 1], ascending; entries p and p + 1 are equal if p has no new tokens.
    """
    (rows, num_heads, dim), (_, page, kv_heads, _) = q.shape, kv.k.shape
    group, batch = num_heads // kv_heads, slots.numel()
    if config is None:
        tiles = kv_heads * triton.cdiv(rows * group, WIDE.rows)
        config = LARGE_HEAD if dim > 128 else WIDE if tiles >= WIDE_TILES else NARROW
    tma = config.tma and page % config.tile == 0 and dim == triton.next_power_of_2(dim)
    k_src, v_src = kv.k, kv.v
    if tma:
        box = [1, config.tile, 1, dim]
        k_src, v_src = (TensorDescriptor.from_tensor(cache, box) for cache in (kv.k, kv.v))
    # Each sequence's last tile may be partly empty, so up to `batch` more tiles are needed.
    tiles = triton.cdiv(rows * group, config.rows) + batch
    batch_pad = 32 if batch <= 32 else max(256, triton.next_power_of_2(batch))  # few variants
    _paged_prefill_kernel[(kv_heads * tiles,)](
        *(q, k_src, v_src, block_tables, slots, query_start, context_lens, out),
        *(scale * LOG2_E, batch),
        (*q.stride()[:2], *kv.k.stride()[:3], block_tables.stride(0), *out.stride()[:2]),
        *(kv_heads, group, dim, page, config.rows, config.tile, tma, batch_pad),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.max_registers,
    )
    return out
