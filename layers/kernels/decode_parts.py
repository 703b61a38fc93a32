"""Parts of decode attention: results of splits in scratch memory, and how they are folded.

A part is the result of one split of a pair's keys: values, sum of weights and highest score of each
row. `paged_decode` explains pairs and rows, `attention_parts` splits, and `DecodeWorkspace` slots.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN201
# mypy: disable-error-code="assignment,misc,var-annotated"

import triton
import triton.language as tl

from layers.kernels.attention_parts import EMPTY, finish, fold_values, fold_weights


@triton.jit
def query_and_head(rows, GROUP: tl.constexpr, QUERIES: tl.constexpr):
    """For each row of a pair, return the index of its new token and the index of its query head."""
    if QUERIES == 1:
        query, member = 0, rows
    else:
        query, member = rows // GROUP, rows % GROUP
    return query, member


@triton.jit
def store_part(work, slot, acc, norm, top, rows, dims, PART_ROWS: tl.constexpr):
    """Store the result of a split, or a total, in a slot."""
    values_ptr, norm_ptr, top_ptr, _ = work
    used = rows < PART_ROWS
    at = slot.to(tl.int64) * PART_ROWS + rows
    tl.store(norm_ptr + at, norm, mask=used)
    tl.store(top_ptr + at, top, mask=used)
    tl.store(values_ptr + at[:, None] * dims.shape[0] + dims[None, :], acc, mask=used[:, None])


@triton.jit
def _load_part(work, slot, live, row, columns, PART_ROWS: tl.constexpr):
    """Load what a slot holds, for the row of each of `columns` [COLUMNS]."""
    values_ptr, norm_ptr, top_ptr, _ = work
    # `.cg` reads from the L2 cache, since L1 may hold old values of other programs' parts.
    at, first = slot.to(tl.int64) * PART_ROWS + row, slot.to(tl.int64) * columns.shape[0]
    norm = tl.load(norm_ptr + at, mask=live, other=0.0, cache_modifier=".cg")
    top = tl.load(top_ptr + at, mask=live, other=EMPTY, cache_modifier=".cg")
    acc = tl.load(values_ptr + first + columns, mask=live, other=0.0, cache_modifier=".cg")
    return acc, norm, top


@triton.jit
def combine(
    work,
    owner,
    first_slot,
    splits,
    place,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Fold parts of `splits` (begin, end) onto the total that `owner` stored; store the output.

    The last element of `place` is the range of a part's values, which all threads share.
    """
    out_at, out_row, out_head, columns = place
    begin, end = splits
    PART_ROWS: tl.constexpr = triton.next_power_of_2(QUERIES * GROUP)
    DIM_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    row, dim = columns // DIM_PAD, columns % DIM_PAD
    query, member = query_and_head(row, GROUP, QUERIES)
    t_acc, t_norm, t_top = _load_part(work, owner, row >= 0, row, columns, PART_ROWS)
    for start in range(begin, end, UNROLL):
        parts = ()  # all loads come before the first of them is needed
        for i in tl.static_range(UNROLL):
            split = start + i
            live = (split < end) & (row >= 0)
            parts += (_load_part(work, first_slot + split, live, row, columns, PART_ROWS),)
        for i in tl.static_range(UNROLL):
            acc, norm, top = parts[i]
            a, b, t_norm, t_top = fold_weights(t_norm, t_top, norm, top)
            t_acc = fold_values(t_acc, a, b, acc)
    live = (row < QUERIES * GROUP) & (dim < DIM)
    at = out_at + query * out_row + member * out_head + dim
    tl.store(at, finish(t_acc, t_norm).to(out_at.dtype.element_ty), mask=live)
