"""Loads of K and V for `paged_decode`, by tiles of keys.

A request's `span` says which tokens are loaded: the number of tokens that are skipped, which are
whole splits before a sliding window, and then, counted from the first token that is not skipped,
the numbers of tokens that are hidden by the window (None without a window) and of all tokens.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN201
# mypy: disable-error-code="assignment,misc,var-annotated"

import triton
import triton.language as tl


@triton.jit
def tile_pages(table, t, span, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Load the page id of tile `t`, or of each of its tokens if a tile may span several pages."""
    skipped, hidden, num_tokens = span
    if PAGE % TILE == 0:
        there = t * TILE < num_tokens
        if hidden is not None:
            there = there & (t * TILE + TILE > hidden)
        pages = tl.load(table + (skipped + t * TILE) // PAGE, mask=there, other=0)
    else:
        tokens = t * TILE + tl.arange(0, TILE)
        there = seen_tokens(tokens, hidden, num_tokens)
        pages = tl.load(table + (skipped + tokens) // PAGE, mask=there, other=0)
    return pages.to(tl.int64)


@triton.jit
def seen_tokens(tokens, hidden, num_tokens):
    """Return which tokens are among the first `num_tokens`, but not among the first `hidden`."""
    there = tokens < num_tokens
    if hidden is not None:
        there = there & (tokens >= hidden)
    return there


@triton.jit
def _tile_rows(page, first, page_stride, token_stride, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Return (base, rows): tokens from `first` on are at base + rows [TILE, 1] in the cache."""
    offsets = tl.arange(0, TILE)
    if PAGE % TILE == 0:
        base = page * page_stride + first % PAGE * token_stride
        rows = offsets[:, None] * token_stride
    else:
        base = 0
        rows = (page * page_stride + (first + offsets) % PAGE * token_stride)[:, None]
    return base, rows


@triton.jit
def split_pages(table, split, span, PAGE: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Load `tile_pages` of each block of BLOCK keys of a split."""
    pages = ()
    if PAGE % KEYS == 0:
        page = tile_pages(table, split, span, PAGE, KEYS)
        for _ in tl.static_range(KEYS // BLOCK):
            pages += (page,)
    else:
        for i in tl.static_range(KEYS // BLOCK):
            t = split * (KEYS // BLOCK) + i
            pages += (tile_pages(table, t, span, PAGE, BLOCK),)
    return pages


@triton.jit
def load_tile(
    src, t, span, page, strides, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr
):
    """Load K or V [TILE, DIM_PAD] of a pair's tokens in tile `t`; 0 for tokens outside `span`."""
    skipped, hidden, num_tokens = span
    dims = tl.arange(0, triton.next_power_of_2(DIM))
    base, rows = _tile_rows(page, skipped + t * TILE, strides[0], strides[1], PAGE, TILE)
    seen = seen_tokens(t * TILE + tl.arange(0, TILE), hidden, num_tokens)
    return tl.load(
        src + base + rows + dims[None, :], mask=seen[:, None] & (dims < DIM)[None, :], other=0.0
    )
