"""Linear layers on Hopper GPUs whose bits do not depend on the number of tokens.

A product computes N outputs from K inputs of each of T tokens; its weight is [N, K]. The K inputs
are divided into P equal *parts*. For each part one float32 accumulator adds up the products over
ascending k, in the tensor cores. Then the accumulators are added up: a0 + a1, or (a0 + a1) +
(a2 + a3). Every kernel here computes exactly this, so all have the same bits: on an H200, tiles of
8 to 128 tokens, 16 to 256 outputs and chunks of 16 to 256 inputs, by mma.sync or wgmma, did not
change a single bit. P must be a property of the weight, never of T. See docs/exact.md.

A norm before a product is split up. Whoever makes the residual stream also multiplies it by the
norm's weight (*gained*), and adds up its squares. The product's epilogue divides by the RMS. So the
product need not wait for a sum over a whole row.

Kernels start before the previous kernel ends if `pdl` is set (programmatic dependent launch), copy
weights to shared memory, and wait for the previous kernel: the gaps between short kernels would
take longer than their memory traffic.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from layers.kernels.prefill_product import prefill_kernel
from layers.kernels.product_kernels import rows_kernel
from layers.kernels.tile_product import tile_kernel, wide_kernel
from layers.kernels.tma import descriptor
from layers.norm_rope import GAIN, Scale

MAX_FUSED_TOKENS = 16  # `add_product` takes at most so many tokens
_WIDE_TOKENS, _TILE_TOKENS = 32, 256
_MULTIPROCESSORS = 132  # H100 and H200
# Without a gate, tiles of 128 tokens are used only for weights of at most this many elements. For
# 128 tokens with these tiles, on an H200 `tile_kernel` takes 11.7 us for a weight [1536, 8960]
# (cuBLAS: 12.8 us), and 18.2 us for a weight [4096, 4096] (cuBLAS: 14.5 us).
_TALL_WEIGHTS = 14 * 2**20
_SHARED = 216 << 10  # bytes of shared memory for stages; a program can have at most 227 KB


def parts_of(n: int, k: int) -> int:
    """Return P for a weight [n, k] whose product is added to the residual stream.

    P = 4 lets four warps share the K inputs if there are few tokens. One accumulator over 3,072
    inputs would take some 3.5 us: about 30 cycles for each 16 inputs, one after another. P is 2 or
    1 if 4 parts would not be multiples of 64 inputs. All other products have P = 1. Their weights
    have more outputs, so enough programs run without a division of K.
    """
    return next((p for p in (4, 2) if k % (p * 64) == 0 and k >= p * 128 and n % 32 == 0), 1)


def supports_products(n: int, k: int) -> bool:
    """Whether a weight [n, k] can be multiplied: TMA needs rows of a multiple of 16 bytes."""
    return k % 8 == 0 and k >= 128 and n * k < 2**31


def interleaved(gate_up: Tensor) -> Tensor:
    """Return a weight [2n, K], gate then up, as alternate groups of 8 rows of each; 8 divides n."""
    return gate_up.view(2, -1, 8, gate_up.shape[1]).transpose(0, 1).reshape(gate_up.shape)


def _cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. `triton.cdiv` takes 1.5 us, a tenth of the time of `multiply`."""
    return -(-a // b)


class _Tile(NamedTuple):
    """Constants of `tile_kernel`: BM tokens, BN columns, chunks of BK inputs; see `multiply`."""

    BM: int
    BN: int
    BK: int
    STAGES: int
    SPLITS: int = 1

    def programs(self, tokens: int, columns: int) -> int:
        return _cdiv(tokens, self.BM) * _cdiv(columns, self.BN) * self.SPLITS


def _tile_of(
    tokens: int, columns: int, k: int, parts: int, gated: bool, partial: bool
) -> _Tile | None:
    """Return constants for `tile_kernel`, or None if `prefill_kernel` is to be used."""
    # For each linear layer of Qwen3-0.6B and Qwen2-1.5B, 20 to 150 values of `_Tile` were timed on
    # an H200. With the fastest values all programs run at the same time, on at least half of the
    # multiprocessors, and no program reads more than 2,560 of the K inputs.
    bk = 128 if k % (parts * 128) == 0 else 64
    if k % (parts * bk) and parts > 1:
        return None
    if gated:
        if tokens <= 128:
            small = _Tile(64, 64, 128, 6) if tokens <= 64 else _Tile(128, 64, 128, 4)
            wide = _Tile(64, 128, 64, 4) if tokens <= 64 else _Tile(128, 128, 64, 3)
            tiles = [small, wide] if small.programs(tokens, columns) <= _MULTIPROCESSORS else [wide]
        else:
            tiles = [_Tile(128, 128, 64, 6)]
        most = 1.25 * _MULTIPROCESSORS
        tiles = [t for t in tiles if k <= 2560 and t.programs(tokens, columns) <= most]
        return tiles[0] if tiles else None
    for tile in (_Tile(64, 64, bk, 768 // bk), _Tile(128, 64, bk, 512 // bk)):
        programs = tile.programs(tokens, columns)
        ways = [s for s in (1, 2, 4) if parts % s == 0 and programs * s <= _MULTIPROCESSORS]
        enough = (s for s in ways if k // s <= 1024 and programs * s >= 64)
        splits = next(enough, max(ways, default=0))
        suits = tile.BM == 64 or (tokens > 64 and columns * k <= _TALL_WEIGHTS)
        if splits and k // splits <= 2560 and suits:
            few = parts == 1 and programs < 48
            return tile._replace(BN=32 if few else 64, SPLITS=splits)
    # If the K inputs of a part are no multiple of 128, `prefill_kernel` takes chunks of 64. Then it
    # takes 29 us for 256 tokens and a weight [1536, 8960], with the sum of parts, and these tiles
    # take 21 us (cuBLAS without that sum: 18 us). With chunks of 128 it is faster than these tiles.
    tile = _Tile(128, 128, 64, 6, parts)
    fits = k // parts <= 2560 and tile.programs(tokens, columns) <= _MULTIPROCESSORS
    return tile if partial and bk == 64 and fits else None


class _Prefill(NamedTuple):
    """Constants of `prefill_kernel`; `cost` is a tile's time in ns for each of the K inputs."""

    groups: int
    BN: int
    BK: int
    stages: int
    cost: float
    halves: bool = False


# The costs follow from times on an H200 for weights of Qwen3-0.6B, Qwen2-1.5B and Qwen3-8B; that of
# tiles [64, 128] is a guess. With the fastest of 12 to 16 kernels for each weight, products took
# 0.82 to 1.24 times as long as with cuBLAS for 1,024 to 8,192 tokens, and 0.87 to 1.34 times for
# 256 to 512. These kernels had an option that is gone: to begin a tile before the last one's end.
_PREFILL = (
    _Prefill(2, 256, 64, 4, 12.0, halves=True),
    _Prefill(2, 128, 64, 6, 6.3),
    _Prefill(2, 64, 64, 8, 3.9),
    _Prefill(1, 128, 64, 8, 5.0),
    _Prefill(1, 64, 128, 6, 2.7),
    _Prefill(1, 32, 128, 8, 2.15),
)


# Time in ns that a second launch adds: a guess. With it, two launches took 0.80 to 0.99 of the time
# of one for 8 products on an H200.
_LAUNCH = 3000.0


# Without the cache, the choice takes a CPU 29 us, twice as long as the rest of `multiply`.
@functools.lru_cache(maxsize=4096)
def _prefill_of(
    tokens: int, columns: int, k: int, parts: int, gated: bool
) -> tuple[tuple[_Prefill, int], ...]:
    """Return constants for one or two launches, and the number of columns of each.

    Two launches save time where the tiles of one fill a few multiprocessors once more than others.
    """

    def tiles(kind: _Prefill, width: int) -> int:
        return _cdiv(tokens, 64 * kind.groups) * _cdiv(width, kind.BN)

    def best(width: int) -> tuple[float, _Prefill]:
        times = [_cdiv(tiles(t, width), _MULTIPROCESSORS) * t.cost for t in kinds]
        return min(zip(times, kinds, strict=True), key=lambda found: found[0])

    # Registers limit tiles of 256 columns to one part; a part must have at least two chunks.
    kinds = [t for t in _PREFILL if not (t.BN == 256 and parts > 1) and not (gated and t.BN < 64)]
    least, kind = best(columns)
    launches = [(kind, columns)]
    for first in kinds:
        full = tiles(first, columns) // _MULTIPROCESSORS
        width = full * _MULTIPROCESSORS // _cdiv(tokens, 64 * first.groups) * first.BN
        if 0 < width < columns:
            rest, second = best(columns - width)
            time = full * first.cost + rest + _LAUNCH / k
            if time < least:
                least, launches = time, [(first, width), (second, columns - width)]
    if k % (parts * 128) == 0 and k >= parts * 256:
        return tuple(launches)
    return tuple((t if t.BK == 64 else t._replace(BK=64, stages=6), w) for t, w in launches)


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    parts: int = 1,
    scale: Scale | None = None,
    gate: str | None = None,
    partial: bool = False,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Compute ``f(x @ weight.T * scale + bias)`` [T, N]. The GPU needs compute capability 9.0.

    Args:
        x: bf16 or fp16 [T, K]; the stride of rows is a multiple of 8 elements, or of 16
            if ``parts`` > 1.
        weight: contiguous [N, K]; with ``gate`` [2N, K] in the order of ``interleaved``.
        bias: [N]; not allowed together with ``gate`` or ``partial``.
        parts: P; 1 together with ``scale`` or ``gate``.
        scale: what a norm before the product divides by, from ``gain_rows``; None for no norm.
        gate: "silu" or "gelu_tanh": f is this function of the gate, times up, both in x's dtype.
            If None, f is the identity.
        partial: the result may be float32 [S, T, N]: S summands, to be added up in the order of
            parts, S = 2 or 4.
        out: tensor for the result, [T, N] in x's dtype with contiguous rows.
        pdl: use programmatic dependent launch. Earlier kernels must not write the weights or bias.

    Raises a ValueError for other shapes, strides, dtypes or combinations.
    """
    tokens, columns = x.shape[0], weight.shape[0]
    n = columns if gate is None else columns // 2
    _check(x, weight, parts)
    gated = gate is not None
    if (parts > 1 and (scale is not None or gated)) or (bias is not None and (gated or partial)):
        raise ValueError(
            "parts go with neither scale nor gate, a bias with neither gate nor partial"
        )
    if out is None and not partial:
        out = x.new_empty(tokens, n)
    if not tokens:
        return x.new_empty(0, n) if out is None else out
    job = _Job(x, weight, bias, parts, scale, gate, out, pdl)
    if tokens <= MAX_FUSED_TOKENS and parts > 1:
        return job.by_rows(None)[0]
    if tokens <= _WIDE_TOKENS and (parts == 1 or partial):
        return job.wide()
    about = (tokens, columns, x.shape[1], parts, gated, partial)
    tile = _tile_of(*about) if tokens <= _TILE_TOKENS else None
    if tile is not None:
        return job.tiled(tile if partial else tile._replace(SPLITS=1))
    return job.prefill()


def add_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    *,
    parts: int,
    pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add ``multiply(x, weight, bias, parts=parts)`` to the residual [T, N] of T <= 16 tokens.

    All tensors are bf16 or fp16. T may be 0, with any P: a step that only computes a part of a
    prompt draws no token. Else a ValueError is raised for P = 1 and for more tokens.
    Returns the new stream; the stream times the next norm's weight [N] and `GAIN`; and its sums of
    squares, float32 [N / 16, T], for a `Scale`.
    """
    _check(x, weight, parts)
    if not len(x):
        return residual, residual, x.new_empty(len(norm_weight) // 16, 0, dtype=torch.float32)
    if parts == 1 or len(x) > MAX_FUSED_TOKENS:
        raise ValueError(f"{parts} parts and {len(x)} tokens: needs 2 or 4 parts, 1 to 16 tokens")
    job = _Job(x, weight, bias, parts, None, None, x.new_empty(x.shape[0], weight.shape[0]), pdl)
    return job.by_rows((residual, norm_weight))


def _check(x: Tensor, weight: Tensor, parts: int) -> None:
    if weight.shape[1] != x.shape[1] or not weight.is_contiguous() or weight.dtype != x.dtype:
        raise ValueError(f"weight must be contiguous [N, {x.shape[1]}], got {tuple(weight.shape)}")
    rows = 16 if parts > 1 else 8
    if x.stride(1) != 1 or x.stride(0) % rows or x.data_ptr() % 16 or weight.data_ptr() % 16:
        raise ValueError(f"x and weight must be aligned to 16 bytes, rows of x to {rows} elements")


class _Job(NamedTuple):
    """One product, and the kernels that can compute it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    parts: int
    scale: Scale | None
    gate: str | None
    out: Tensor | None
    pdl: bool

    def by_rows(self, stream: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        (tokens, k), n = self.x.shape, self.weight.shape[0]
        bm, bn = (8 if tokens <= 8 else 16), (32 if n >= 4096 or self.parts < 4 else 16)
        kc = 128 if k % (self.parts * 128) == 0 else 64
        chunks = k // (self.parts * kc)
        stage = self.parts * kc * (bn + bm) * 2
        # If all programs run at the same time, each takes a multiprocessor's whole shared memory.
        budget = _SHARED if n // bn <= _MULTIPROCESSORS else _SHARED // 2
        stages = min(chunks, max(2, (budget - 4 * self.parts * bn * bm) // stage))
        out = self.out if self.out is not None else self.x.new_empty(tokens, n)
        gained, squares, given = out, out, None
        if stream is not None:
            gained = torch.empty_like(out)
            squares = out.new_empty(n // 16, tokens, dtype=torch.float32)
            given = (*stream, gained, squares)
        residual_stride = 0 if stream is None else stream[0].stride(0)
        rows_kernel[(n // bn,)](
            *(self.x, self.weight, self.bias, out, given),
            *((self.x.stride(0), residual_stride, out.stride(0)), tokens, n, k),
            *(bm, bn, kc, self.parts, chunks, stages, GAIN[self.x.dtype]),
            num_warps=self.parts * bn // 16,
            launch_pdl=self.pdl,
        )
        return out, gained, squares

    def wide(self) -> Tensor:
        (tokens, k), columns = self.x.shape, self.weight.shape[0]
        out, n = self._output(self.parts)
        bm = next(size for size in (8, 16, 32) if size >= tokens)
        bk = next((b for b in (256, 128) if k % (self.parts * b) == 0), 64)
        chunks = _cdiv(k, self.parts * bk)
        programs = _cdiv(columns, 64) * self.parts
        budget = _SHARED if programs <= _MULTIPROCESSORS else _SHARED // 2
        stages = min(chunks, budget // ((64 + bm) * bk * 2))
        summands = 0 if self.scale is None else self.scale.squares.shape[0]
        wide_kernel[(_cdiv(columns, 64), self.parts)](
            *(descriptor(self.x, bm, bk), descriptor(self.weight, 64, bk)),
            *(*self._epilogue(), out, self._strides(out), tokens, n, *self._norm()),
            *(bm, bk, chunks, stages, self.gate, summands, max(0, summands - 1).bit_length()),
            num_warps=4,
            launch_pdl=self.pdl,
        )
        return out

    def tiled(self, tile: _Tile) -> Tensor:
        (tokens, k), columns = self.x.shape, self.weight.shape[0]
        out, n = self._output(tile.SPLITS)
        parts = self.parts // tile.SPLITS
        chunks = _cdiv(k, self.parts * tile.BK)
        # Each warp keeps its share of the accumulators of all parts in registers.
        warps = 8 if tile.BM * tile.BN * (2 if parts > 1 else 1) > 128 * 64 else 4
        grid = (_cdiv(columns, tile.BN), _cdiv(tokens, tile.BM), tile.SPLITS)
        tile_kernel[grid](
            *(descriptor(self.x, tile.BM, tile.BK), descriptor(self.weight, tile.BN, tile.BK)),
            *(*self._epilogue(), out, self._strides(out), tokens, n, *self._norm()),
            *(tile.BM, tile.BN, tile.BK, parts, chunks, min(tile.STAGES, parts * chunks), warps),
            *(self.gate, self.scale is not None),
            num_warps=warps,
            launch_pdl=self.pdl,
        )
        return out

    def prefill(self) -> Tensor:
        (tokens, k), columns = self.x.shape, self.weight.shape[0]
        out, n = self._output(1)
        if out.stride(0) % 8 or out.data_ptr() % 16 or k < 128 * self.parts:
            # TMA cannot store such rows, and a part needs two chunks. `tile_kernel` is less strict.
            for start in range(0, tokens, _TILE_TOKENS):
                rows = slice(start, start + _TILE_TOKENS)
                scale = self.scale
                if scale is not None:
                    scale = scale._replace(squares=scale.squares[:, rows])
                job = self._replace(x=self.x[rows], out=out[rows], scale=scale)
                job.tiled(_Tile(128, 64, 64, 6))
            return out
        start, bias = 0, self.bias
        for kind, width in _prefill_of(tokens, columns, k, self.parts, self.gate is not None):
            end = start + width
            here = slice(start * n // columns, end * n // columns)
            job = self._replace(weight=self.weight[start:end], out=out[:, here])
            job._replace(bias=None if bias is None else bias[here]).by_tiles(kind)
            start = end
        return out

    def by_tiles(self, kind: _Prefill) -> None:
        (tokens, k), columns = self.x.shape, self.weight.shape[0]
        out, n = self._output(1)
        tiles = _cdiv(tokens, 64 * kind.groups), _cdiv(columns, kind.BN)
        threads = 32 * (4 * kind.groups + 4)  # three warps beside the producer are idle
        registers = min(255, 65536 // threads) // 8 * 8
        of_consumer = (registers * threads - 24 * 128) // (128 * kind.groups) // 8 * 8
        squares, bias = self._epilogue()
        width = kind.BN // 2 if self.gate or kind.halves else kind.BN
        prefill_kernel[(min(tiles[0] * tiles[1], _MULTIPROCESSORS),)](
            *(descriptor(self.x, 64, kind.BK), descriptor(self.weight, kind.BN, kind.BK)),
            *(descriptor(out, 64, width), squares, bias, *tiles),
            *(_cdiv(k, self.parts * kind.BK), tokens, n, *self._norm()),
            *(self.parts, kind.groups, kind.stages, self.gate, min(240, of_consumer)),
            num_warps=4,
            maxnreg=registers,
        )

    def _output(self, splits: int) -> tuple[Tensor, int]:
        """Return the tensor for the result or for its summands, and N."""
        n = self.weight.shape[0] // (1 if self.gate is None else 2)
        if splits > 1:
            shape = (splits, self.x.shape[0], n)
            return self.x.new_empty(shape, dtype=torch.float32), n
        return self.x.new_empty(self.x.shape[0], n) if self.out is None else self.out, n

    def _strides(self, out: Tensor) -> tuple[int, int]:
        return out.stride(-2), out.stride(0) if out.dim() == 3 else 0

    def _epilogue(self) -> tuple[Tensor | None, Tensor | None]:
        return None if self.scale is None else self.scale.squares, self.bias

    def _norm(self) -> tuple[float, float]:
        return (1.0, 0.0) if self.scale is None else (1.0 / self.scale.size, self.scale.eps)
