"""Paged attention against its torch reference, on a CPU through Triton's interpreter.

Collected normally, this file offers one test that starts the others in a process of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from memory.kv_cache import KVLayer
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
)

if INTERPRET and HAS_TRITON:
    from layers.kernels.decode_launch import DecodeConfig, decode_workspace
    from layers.kernels.paged_decode import (
        paged_decode,
    )
    from layers.kernels.paged_prefill import (
        PrefillConfig,
        paged_prefill,
    )

    patch_interpreter()

_SLOW = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A paged cache in random order, with poison wherever attention must not look."""

    kv: KVLayer
    block_tables: Tensor
    slots: Tensor
    context_lens: Tensor


def make_case(
    lens: Sequence[int],
    kv_heads: int,
    dim: int,
    page: int,
    dtype: torch.dtype,
    device: str,
    first_reads: Sequence[int] = (),
) -> Case:
    """Free pages and tails are NaN, unused table entries huge.

    `first_reads`: the first token of each request that is read; pages before it have been freed.
    """
    first_reads = first_reads or [0] * len(lens)
    need = [-(-length // page) for length in lens]
    pages = sum(need) + 3
    cache = torch.full((pages, page, 2, kv_heads, dim), float("nan"), dtype=dtype, device=device)
    tables = torch.full((len(lens) + 2, max(need) + 2), 1 << 30, dtype=torch.int32)
    slots = torch.randperm(len(tables))[: len(lens)].int()
    free = torch.randperm(pages).tolist()
    for slot, length, first in zip(slots.tolist(), lens, first_reads, strict=True):
        for index, start in enumerate(range(0, length, page)):
            if start + page <= first:
                continue
            tables[slot, index] = free.pop()
            filled = min(page, length - start)
            values = torch.randn(filled, 2, kv_heads, dim, device=device)
            cache[tables[slot, index], :filled] = values.to(dtype)
    lengths = torch.tensor(lens, dtype=torch.int32, device=device)
    return Case(KVLayer.of(cache), tables.to(device), slots.to(device), lengths)


def relative_error(out: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; NaN if an element was not written."""
    return float((out.float() - want).norm() / want.norm())


@starts_interpreter
def test_in_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.mark.slow
@starts_interpreter
def test_in_interpreter_what_is_slow() -> None:
    run_in_interpreter(__file__, "slow")


@interpreted
@pytest.mark.parametrize(
    ("lens", "heads", "dim", "page", "block", "programs", "early"),
    [
        ([5], (2, 1), 64, 16, 16, 4, False),
        ([1], (1, 1), 64, 16, 16, 4, True),
        # Several pairs per program, padded rows, one long sequence among short ones.
        ([37, 0, 1, 64, 200], (4, 2), 64, 16, 32, 8, False),
        ([200, 3, 0, 17, 90], (12, 2), 64, 64, 32, 12, False),
        ([0, 0], (2, 2), 64, 16, 16, 4, False),
        # Programs to spare: pairs in parts, the current token added apart.
        ([33, 0, 1, 64], (4, 2), 64, 64, 32, 48, True),
        ([33, 0, 17], (6, 1), 80, 16, 16, 32, True),
        ([700], (2, 1), 64, 32, 16, 40, True),
        ([90, 129], (7, 1), 64, 16, 32, 24, False),
        # A program with a stretch inside one pair.
        ([150, 40], (8, 1), 64, 32, 16, 3, False),
    ],
)
def test_decode(
    lens: list[int],
    heads: tuple[int, int],
    dim: int,
    page: int,
    block: int,
    programs: int,
    early: bool,
) -> None:
    torch.manual_seed(0)
    case = make_case(lens, heads[1], dim, page, torch.float16, "cpu")
    # q as the engine has it: a slice of the fused projection.
    q = torch.randn(len(lens), heads[0] + 2 * heads[1], dim).half()[:, : heads[0]]
    arguments = (q, case.kv, case.block_tables, case.slots, case.context_lens)
    workspace = decode_workspace(torch.device("cpu"), *heads, dim, 1024, programs)
    for pair_cost in (0, 2):
        config = DecodeConfig(block, 4, 2, per_sm=4, unroll=3, pair_cost=pair_cost)
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        want = torch.full(q.shape, float("nan"))
        paged_decode(
            *arguments,
            scale=dim**-0.5,
            max_context_len=1024,
            out=out,
            workspace=workspace,
            pdl=early,
            config=config,
        )
        paged_decode_reference(*arguments, scale=dim**-0.5, out=want)
        if any(lens):
            # float16 probabilities against float32 ones: 3e-4 seen.
            assert relative_error(out, want) < 1e-3
        assert not out[case.context_lens == 0].any()
        assert not workspace.arrived.any()


@interpreted
@pytest.mark.parametrize(
    ("rows", "lens", "heads", "page", "block", "programs", "early"),
    [
        # Contexts about a tile's border, fewer visible tokens than rows, padding; shared pairs.
        (1, [31, 32, 33, 0], (12, 2), 16, 16, 6, False),
        (2, [31, 0, 32, 33, 1], (12, 2), 16, 16, 7, False),
        pytest.param(2, [64, 65, 66, 0, 2], (16, 8), 32, 32, 40, False, marks=_SLOW),
        pytest.param(2, [97], (32, 1), 16, 32, 5, False, marks=_SLOW),
        (4, [16, 17, 18, 19, 20, 3, 0], (16, 8), 16, 16, 25, False),
        (4, [70, 0, 4, 131], (12, 2), 64, 32, 9, False),
        pytest.param(4, [3, 35], (32, 1), 64, 32, 4, False, marks=_SLOW),
        pytest.param(5, [15, 36, 0, 4, 5, 68], (12, 2), 16, 32, 8, False, marks=_SLOW),
        (5, [120, 33], (32, 1), 16, 16, 11, False),
        # Programs to spare: pairs in parts, tables and lengths read early.
        (2, [33, 0, 1, 64], (12, 2), 64, 32, 48, True),
        pytest.param(4, [66, 130, 0, 2], (16, 8), 16, 32, 160, True, marks=_SLOW),
        (5, [240, 3], (12, 2), 32, 16, 64, True),
        # None to spare, lengths alone read early.
        (5, [34, 0, 90], (16, 8), 16, 16, 20, True),
    ],
)
def test_decode_of_several_rows(
    rows: int,
    lens: list[int],
    heads: tuple[int, int],
    page: int,
    block: int,
    programs: int,
    early: bool,
) -> None:
    """Against the reference, and against requests of one row each with as many visible tokens."""
    torch.manual_seed(rows)
    dim, count = 16, rows * len(lens)
    case = make_case(lens, heads[1], dim, page, torch.float16, "cpu")
    q = torch.randn(count, heads[0] + 2 * heads[1], dim).half()[:, : heads[0]]
    cache = (q, case.kv, case.block_tables)
    # The largest number of rows decides on the workspace, whatever a call has.
    workspace = decode_workspace(
        torch.device("cpu"), *heads, dim, 1024, programs, rows_per_request=5
    )
    visible = case.context_lens[:, None] + torch.arange(1 - rows, 1)
    visible = visible.clamp(min=0).flatten().int()
    want, alone = torch.full((2, *q.shape), float("nan"))
    about: dict[str, Any] = {"scale": dim**-0.5}
    paged_decode_reference(
        *cache, case.slots, case.context_lens, **about, out=want, rows_per_request=rows
    )
    paged_decode_reference(*cache, case.slots.repeat_interleave(rows), visible, **about, out=alone)
    torch.testing.assert_close(want, alone)
    for pair_cost in (0, 2):
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        paged_decode(
            *cache,
            case.slots,
            case.context_lens,
            **about,
            max_context_len=1024,
            out=out,
            rows_per_request=rows,
            workspace=workspace,
            pdl=early,
            config=DecodeConfig(block, 4, 2, per_sm=4, unroll=3, pair_cost=pair_cost),
        )
        assert relative_error(out, want) < 1e-3
        for row in range(count):
            # Each row alone, so that no large one hides a small one.
            torch.testing.assert_close(out[row].float(), want[row], rtol=1e-2, atol=5e-3)
        assert not out[visible == 0].any()
        assert not workspace.arrived.any()


@interpreted
def test_decode_refuses_rows_that_do_not_fit() -> None:
    case = make_case([5, 9], 2, 16, 16, torch.float16, "cpu")
    cache = (case.kv, case.block_tables, case.slots, case.context_lens)
    about: dict[str, Any] = {"scale": 0.25, "max_context_len": 16}
    about["workspace"] = decode_workspace(torch.device("cpu"), 4, 2, 16, 16, 4, rows_per_request=2)
    q = torch.randn(7, 4, 16).half()
    with pytest.raises(ValueError, match="7 rows"):
        paged_decode(q, *cache, **about, out=q, rows_per_request=2)
    q = torch.randn(6, 4, 16).half()
    with pytest.raises(ValueError, match="for 2 rows of a request"):
        paged_decode(q, *cache, **about, out=q, rows_per_request=3)


@interpreted
@pytest.mark.parametrize("programs", [5, 12, 40])
def test_padding_counts_no_arrivals(programs: int) -> None:
    """Steps of padding run on several streams at once, with one workspace."""
    case = make_case([0] * 9, 2, 64, 16, torch.float16, "cpu")
    q = torch.randn(9, 4, 64).half()
    workspace = decode_workspace(torch.device("cpu"), 4, 2, 64, 1024, programs)
    workspace.arrived.fill_(1000)
    paged_decode(
        *(q, case.kv, case.block_tables, case.slots, case.context_lens),
        scale=0.125,
        max_context_len=1024,
        out=q,
        workspace=workspace,
        config=DecodeConfig(32, 4, 2, per_sm=4, pair_cost=2),
    )
    assert not q.any()
    assert (workspace.arrived == 1000).all()


@interpreted
@pytest.mark.parametrize(
    ("queries", "before", "heads", "dim", "page", "rows"),
    [
        ([5, 1], [0, 3], (2, 1), 64, 16, 16),
        # Chunks after a prefix, a sequence without queries.
        ([5, 40, 0, 1], [0, 17, 3, 60], (4, 2), 64, 32, 32),
        # Groups that are no power of two; pages smaller than a tile.
        ([37, 40], [0, 17], (6, 1), 64, 16, 32),
        ([37, 40], [11, 0], (7, 1), 80, 32, 32),
        ([50], [14], (1, 1), 64, 64, 16),
        # Several splits; pages of more than a split, and of no power of two.
        ([70, 3], [200, 126], (2, 1), 16, 256, 64),
        ([150], [110], (4, 2), 16, 48, 32),
        # More sequences than the kernel looks at in its smallest form.
        ([3, 0] * 17, [0, 5] * 17, (2, 1), 16, 16, 16),
    ],
)
def test_prefill(
    queries: list[int],
    before: list[int],
    heads: tuple[int, int],
    dim: int,
    page: int,
    rows: int,
) -> None:
    torch.manual_seed(0)
    lens = [new + old for new, old in zip(queries, before, strict=True)]
    case = make_case(lens, heads[1], dim, page, torch.float16, "cpu")
    # Rows behind the last sequence are padding, which stays as it is.
    count = sum(queries)
    q = torch.randn(count + 9, heads[0] + 2 * heads[1], dim).half()[:, : heads[0]]
    start = torch.tensor([0, *queries]).cumsum(0).int()
    arguments = (
        q,
        case.kv,
        case.block_tables,
        case.slots,
        start,
        case.context_lens,
    )
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    want = torch.full(q.shape, float("nan"))
    paged_prefill(
        *arguments,
        scale=dim**-0.5,
        out=out,
        config=PrefillConfig(rows, 4, 2),
    )
    paged_prefill_reference(*arguments, scale=dim**-0.5, out=want)
    assert relative_error(out[:count], want[:count]) < 1e-3
    assert out[count:].isnan().all()


WINDOWS = [1, 5, 16, 17, 100, 128, 129, 300]


@interpreted
@pytest.mark.parametrize(
    ("rows", "page", "programs", "early"),
    [(1, 16, 4, False), (1, 16, 60, True), (1, 256, 60, True), (1, 24, 9, False), (3, 64, 7, True)],
)
@pytest.mark.parametrize("window", WINDOWS)
def test_decode_with_windows(window: int, rows: int, page: int, programs: int, early: bool) -> None:
    """Pages before the windows have been freed, and nothing may look their ids up."""
    torch.manual_seed(window)
    lens, heads, dim = [300, 0, 1, 127, 128, 129, 517], (4, 2), 16
    first_reads = [max(0, length - rows + 1 - window) for length in lens]
    case = make_case(lens, heads[1], dim, page, torch.float16, "cpu", first_reads)
    q = torch.randn(rows * len(lens), heads[0] + 2 * heads[1], dim).half()[:, : heads[0]]
    cache = (q, case.kv, case.block_tables, case.slots, case.context_lens)
    about: dict[str, Any] = {"scale": 0.25, "rows_per_request": rows, "window": window}
    want = torch.full(q.shape, float("nan"))
    paged_decode_reference(*cache, **about, out=want)
    workspace = decode_workspace(
        torch.device("cpu"), *heads, dim, 1024, programs, rows_per_request=rows
    )
    for block in (32, 128):
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        paged_decode(
            *cache,
            **about,
            max_context_len=1024,
            out=out,
            workspace=workspace,
            pdl=early,
            config=DecodeConfig(block, 4, 2, per_sm=4, unroll=3),
        )
        torch.testing.assert_close(out.float(), want, rtol=1e-2, atol=5e-3)
        assert not workspace.arrived.any()


@interpreted
@pytest.mark.parametrize(
    ("queries", "before", "page", "rows"),
    [
        ([5, 1, 0, 140], [0, 300, 3, 0], 16, 32),
        ([70, 33], [200, 127], 256, 64),
        ([150], [390], 48, 32),
        # Windows of 128 that begin right behind the first token of a split.
        ([2, 1], [127, 256], 16, 32),
    ],
)
@pytest.mark.parametrize("window", WINDOWS)
def test_prefill_with_windows(
    window: int, queries: list[int], before: list[int], page: int, rows: int
) -> None:
    torch.manual_seed(window)
    heads, dim = (6, 2), 16
    lens = [new + old for new, old in zip(queries, before, strict=True)]
    first_reads = [max(0, old - window + 1) for old in before]
    case = make_case(lens, heads[1], dim, page, torch.float16, "cpu", first_reads)
    q = torch.randn(sum(queries), heads[0] + 2 * heads[1], dim).half()[:, : heads[0]]
    start = torch.tensor([0, *queries]).cumsum(0).int()
    arguments = (q, case.kv, case.block_tables, case.slots, start, case.context_lens)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    want = torch.full(q.shape, float("nan"))
    about: dict[str, Any] = {"scale": 0.25, "window": window}
    paged_prefill(*arguments, **about, out=out, config=PrefillConfig(rows, 4, 2))
    paged_prefill_reference(*arguments, **about, out=want)
    torch.testing.assert_close(out.float(), want, rtol=1e-2, atol=5e-3)
