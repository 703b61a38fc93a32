"""Pages beyond 2^31 elements of a KV pool, on a CPU through Triton's interpreter.

Collected normally, this file offers one test that starts the others in a process of their own.
The pool takes address space alone: only the pages that a test writes become memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.types import KVGeometry
from layers.rotary import Rotation
from memory.kv_cache import KVCache, KVLayer
from tests.kernels.interpreter import (
    HAS_TRITON,
    INTERPRET,
    interpreted,
    patch_interpreter,
    run_in_interpreter,
    starts_interpreter,
)
from tests.kernels.references import (
    paged_decode_reference,
    paged_prefill_reference,
    qk_norm_rope_store_reference,
)
from tests.kernels.test_paged_attention import relative_error
from utils.errors import OutOfMemoryError

if INTERPRET and HAS_TRITON:
    from layers.kernels.decode_launch import DecodeConfig, decode_workspace
    from layers.kernels.paged_decode import (
        paged_decode,
    )
    from layers.kernels.paged_prefill import (
        PrefillConfig,
        paged_prefill,
    )
    from layers.kernels.rowwise import (
        qk_norm_rope_store,
    )

    patch_interpreter()

PAGE, HEADS, KV_HEADS, DIM = 16, 4, 2, 64
_PAGE_SHAPE = (PAGE, 2, KV_HEADS, DIM)
_FAR_PAGE = 2**31 // (PAGE * 2 * KV_HEADS * DIM)
_NUM_FAR = 64
# Up to 42 MB were seen, most of it the interpreter's.
_MOST_BYTES = 256 << 20
_STATM = Path("/proc/self/statm")


@starts_interpreter
def test_in_interpreter() -> None:
    run_in_interpreter(__file__)


@dataclass(frozen=True)
class Pool:
    """Pages of float16, the last ones of which lie beyond 2^31 elements.

    Attributes:
        kv: all pages; those from `_FAR_PAGE` on are the far ones.
        wrapped: [_NUM_FAR, ...] NaN, where the far pages are for those who count in int32. They
            are before the first page, so that a wrong offset harms nothing but the test.
    """

    kv: KVLayer
    wrapped: Tensor

    def fill(self, num_pages: int) -> Tensor:
        """[num_pages] int32 ids of far pages in disorder, with random K and V."""
        ids = torch.randperm(_NUM_FAR)[:num_pages] + _FAR_PAGE
        for page in ids.tolist():
            self.kv.k[page] = torch.randn(PAGE, KV_HEADS, DIM)
            self.kv.v[page] = torch.randn(PAGE, KV_HEADS, DIM)
        return ids.int()


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE if _STATM.exists() else 0


@pytest.fixture
def pool() -> Iterator[Pool]:
    torch.manual_seed(0)
    before = _resident()
    try:
        pages = torch.empty(2 * _FAR_PAGE + _NUM_FAR, *_PAGE_SHAPE, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("8 GiB of address space cannot be had")
    pages[:_NUM_FAR] = float("nan")
    kv = KVLayer.of(pages[_FAR_PAGE:])
    assert kv.k.stride(0) * _FAR_PAGE == 2**31
    kv.flat[_FAR_PAGE * PAGE :] = float("nan")
    yield Pool(kv, pages[:_NUM_FAR])
    assert pages[:_NUM_FAR].isnan().all()
    assert _resident() - before < _MOST_BYTES


@interpreted
@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize(("programs", "early"), [(3, False), (48, False), (48, True)])
def test_decode(pool: Pool, tile: int, programs: int, early: bool) -> None:
    """Tiles within pages and over several; with programs to spare, the current token apart."""
    lens = torch.tensor([100, 1, 33], dtype=torch.int32)
    tables = pool.fill(21).view(3, 7)
    q = torch.randn(3, HEADS, DIM).half()
    arguments = (q, pool.kv, tables, torch.arange(3, dtype=torch.int32), lens)
    out, want = torch.full_like(q, float("nan")), torch.empty(q.shape)
    paged_decode(
        *arguments,
        scale=DIM**-0.5,
        max_context_len=112,
        out=out,
        workspace=decode_workspace(torch.device("cpu"), HEADS, KV_HEADS, DIM, 112, programs),
        pdl=early,
        config=DecodeConfig(tile, 4, 2, per_sm=4),
    )
    paged_decode_reference(*arguments, scale=DIM**-0.5, out=want)
    assert relative_error(out, want) < 1e-3


@interpreted
def test_prefill(pool: Pool) -> None:
    tables = pool.fill(14).view(2, 7)
    lens = torch.tensor([100, 41], dtype=torch.int32)
    start = torch.tensor([0, 30, 71], dtype=torch.int32)
    q = torch.randn(71, HEADS, DIM).half()
    slots = torch.arange(2, dtype=torch.int32)
    arguments = (q, pool.kv, tables, slots, start, lens)
    out, want = torch.full_like(q, float("nan")), torch.empty(q.shape)
    config = PrefillConfig(32, 4, 2)
    paged_prefill(*arguments, scale=DIM**-0.5, out=out, config=config)
    paged_prefill_reference(*arguments, scale=DIM**-0.5, out=want)
    assert relative_error(out, want) < 1e-3


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("norm", [False, True])
def test_store(pool: Pool, dtype: torch.dtype, norm: bool) -> None:
    """Slots are below 2^31 here, and may be int32; the elements behind them are not."""
    count = 20
    slots = (torch.randperm(_NUM_FAR * PAGE)[:count] + _FAR_PAGE * PAGE).to(dtype)
    slots[5] = -1
    qkv = torch.randn(count, (HEADS + 2 * KV_HEADS) * DIM).half()
    weights = (torch.randn(DIM), torch.randn(DIM)) if norm else None
    rotation = Rotation(torch.randint(0, 50, (count,)), *torch.randn(2, 50, DIM // 2))
    about = (qkv, weights, 1e-6, rotation)
    far = pool.kv.flat[_FAR_PAGE * PAGE :]
    expected = KVLayer.of(torch.full((_NUM_FAR, *_PAGE_SHAPE), float("nan"), dtype=torch.float16))
    near = torch.where(slots < 0, slots, slots - _FAR_PAGE * PAGE)
    got = qk_norm_rope_store(*about, slots, pool.kv)
    want = qk_norm_rope_store_reference(*about, near, expected)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(far, expected.flat, equal_nan=True)


@interpreted
def test_copy_of_a_block_and_store_without_kernels() -> None:
    """What torch does for a prefix that is shared in part, and for models in float32."""
    before = _resident()
    geometry = KVGeometry(1, KV_HEADS, DIM, PAGE, _FAR_PAGE + _NUM_FAR, dtype_bytes=2)
    try:
        cache = KVCache(geometry, torch.float16, torch.device("cpu"))
    except OutOfMemoryError:
        pytest.skip("4 GiB of address space cannot be had")
    (kv,) = cache.layers()
    source, target = _FAR_PAGE + 9, _FAR_PAGE + 2
    rows = torch.arange(source * PAGE, (source + 1) * PAGE)
    values = torch.randn(PAGE, 2 * KV_HEADS, DIM).half()
    kv.flat.index_copy_(0, rows, values)
    cache.copy_block(source, target)
    assert torch.equal(kv.flat[target * PAGE : (target + 1) * PAGE], values)
    assert _resident() - before < _MOST_BYTES
