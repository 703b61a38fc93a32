"""Decode attention to the bit, on a CPU through Triton's interpreter.

A row's output has the same bits alone and in company, for any number of programs and any launch.
Collected normally, this file offers one test that starts the others in a process of their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import (
    HAS_TRITON,
    INTERPRET,
    interpreted,
    patch_interpreter,
    run_in_interpreter,
    starts_interpreter,
)
from tests.kernels.references import paged_decode_reference
from tests.kernels.test_paged_attention import Case, make_case, relative_error

if INTERPRET and HAS_TRITON:
    from layers.kernels.decode_launch import DecodeConfig, DecodeWorkspace, decode_workspace
    from layers.kernels.paged_decode import (
        paged_decode,
    )
    from layers.kernels.paged_prefill import (
        paged_prefill,
    )

    patch_interpreter()

LONGEST, PROGRAMS = 1024, 60


@starts_interpreter
def test_in_interpreter() -> None:
    run_in_interpreter(__file__)


def _workspace(heads: tuple[int, int], dim: int, programs: int, rows: int = 1) -> DecodeWorkspace:
    """NaN, as a slot must be read only after it was written."""
    device = torch.device("cpu")
    workspace = decode_workspace(device, *heads, dim, LONGEST, programs, rows_per_request=rows)
    for part in workspace[:3]:
        part.fill_(float("nan"))
    return workspace


def _decode(case: Case, q: Tensor, which: list[int], work: DecodeWorkspace, **about: Any) -> Tensor:
    """Decode the requests `which` of a case in this order; `q` has the rows of all requests."""
    rows, block, pair_cost = about.pop("rows", 1), about.pop("block", 64), about.pop("pair_cost", 0)
    picked = q[[request * rows + row for request in which for row in range(rows)]]
    out = torch.full(picked.shape, float("nan"), dtype=q.dtype)
    paged_decode(
        *(picked, case.kv, case.block_tables, case.slots[which], case.context_lens[which]),
        scale=q.shape[2] ** -0.5,
        max_context_len=LONGEST,
        out=out,
        workspace=work,
        rows_per_request=rows,
        config=DecodeConfig(block, 4, 2, per_sm=4, unroll=3, pair_cost=pair_cost),
        **about,
    )
    assert not work.arrived.any()
    return out


def _case(
    lens: list[int], heads: tuple[int, int], dim: int, page: int, rows: int = 1
) -> tuple[Case, Tensor, Tensor]:
    torch.manual_seed(0)
    case = make_case(lens, heads[1], dim, page, torch.float16, "cpu")
    q = torch.randn(len(lens) * rows, heads[0] + 2 * heads[1], dim).half()[:, : heads[0]]
    want = torch.full(q.shape, float("nan"))
    paged_decode_reference(
        *(q, case.kv, case.block_tables, case.slots, case.context_lens),
        scale=dim**-0.5,
        out=want,
        rows_per_request=rows,
    )
    return case, q, want


@interpreted
@pytest.mark.parametrize(
    ("lens", "heads", "dim", "page"),
    [
        ([300, 0, 1, 128, 129, 517], (4, 2), 64, 64),
        ([15, 16, 17, 255, 256, 700], (3, 1), 16, 16),
        ([385, 97, 0], (12, 2), 16, 256),
        ([144, 290], (2, 2), 80, 24),
    ],
)
def test_alone_and_in_company(lens: list[int], heads: tuple[int, int], dim: int, page: int) -> None:
    case, q, want = _case(lens, heads, dim, page)
    everyone = list(range(len(lens)))
    first = _decode(case, q, everyone, _workspace(heads, dim, PROGRAMS))
    assert relative_error(first, want) < 1e-3
    for programs, block, pair_cost in (
        *((1, 128, 0), (2, 128, 3), (3, 32, 1), (5, 128, 0)),
        *((8, 64, 1), (13, 128, 3), (21, 64, 0), (34, 128, 0)),
    ):
        about: dict[str, Any] = {"block": block, "pair_cost": pair_cost, "pdl": True}
        work = _workspace(heads, dim, programs)
        order = everyone[::-1] if programs % 2 else everyone
        out = torch.empty_like(q)
        out[order] = _decode(case, q, order, work, **about)
        assert torch.equal(out, first), programs
    for request in everyone:
        for programs, pdl in ((1, True), (3, False), (9, True), (64, True), (64, False)):
            work = _workspace(heads, dim, programs)
            alone = _decode(case, q, [request], work, pdl=pdl, block=128)
            assert torch.equal(alone[0], first[request]), (request, programs, pdl)


@interpreted
def test_every_length_of_a_split() -> None:
    """Wherever the newest token lies, also if it is read after the tokens before it."""
    lens = [1, 2, 15, 16, 17, 18, 31, 32, 33, 112, 113, 127, 128, 129, 144, 145, 255, 256, 257]
    case, q, want = _case(lens, (2, 1), 16, 32)
    first = _decode(case, q, list(range(len(lens))), _workspace((2, 1), 16, 7))
    assert relative_error(first, want) < 1e-3
    work = _workspace((2, 1), 16, 8)
    for request in range(len(lens)):
        alone = _decode(case, q, [request], work, pdl=True, block=128 if request % 3 else 32)
        assert torch.equal(alone[0], first[request]), lens[request]


@interpreted
@pytest.mark.parametrize(("rows", "heads", "page"), [(2, (4, 2), 16), (5, (6, 2), 64)])
def test_each_of_several_rows_is_as_if_alone(rows: int, heads: tuple[int, int], page: int) -> None:
    lens = [0, 1, 127 + rows // 2, 260]
    case, q, want = _case(lens, heads, 16, page, rows)
    for programs in (1, 7, 60):
        work = _workspace(heads, 16, programs, rows)
        out = _decode(case, q, list(range(len(lens))), work, rows=rows, pdl=True)
        assert relative_error(out, want) < 1e-3
        if programs == 1:
            first = out
        assert torch.equal(out, first)
    for request, length in enumerate(lens):
        for row in range(rows):
            visible = max(0, length - rows + 1 + row)
            lone = Case(case.kv, case.block_tables, case.slots, case.context_lens.clone())
            lone.context_lens[request] = visible
            mine = torch.zeros_like(q[: len(lens)])
            mine[request] = q[request * rows + row]
            alone = _decode(lone, mine, [request], _workspace(heads, 16, 5), pdl=True)
            assert torch.equal(alone[0], first[request * rows + row]), (length, row)


@interpreted
@pytest.mark.parametrize(("programs", "slots"), [(4, 0), (4, 9), (9, 1), (9, 30), (40, 0), (40, 9)])
def test_fewer_slots_than_parts(slots: int, programs: int) -> None:
    """Where parts might not fit, pairs are not divided; nothing behind the slots is written."""
    lens = [300, 0, 700, 5, 129]
    case, q, _ = _case(lens, (4, 2), 16, 32)
    everyone = list(range(len(lens)))
    want = _decode(case, q, everyone, _workspace((4, 2), 16, PROGRAMS))
    work = _workspace((4, 2), 16, programs)
    short = work._replace(values=work.values[: programs + slots])
    for pdl in (False, True):
        out = _decode(case, q, everyone, short, pair_cost=2, pdl=pdl, block=128)
        assert torch.equal(out, want)
    assert work.values[programs + slots :].isnan().all()


@interpreted
def test_bytes_of_a_workspace() -> None:
    device = torch.device("cpu")
    work = decode_workspace(device, 16, 8, 128, 4096, 528)
    assert work.values.shape == (528 * 33, 2, 128)
    assert sum(part.numel() for part in work) * 4 < 18.2e6
    huge = decode_workspace(torch.device("meta"), 64, 8, 128, 1 << 20, 528)
    assert huge.values.shape[0] > 528
    assert sum(part.numel() for part in huge) * 4 <= (128 << 20) + 4 * 528


@interpreted
@pytest.mark.parametrize("window", [1, 20, 128, 200])
@pytest.mark.parametrize("page", [16, 64, 256])
def test_windows_have_the_same_bits_in_decodes_and_chunks(page: int, window: int) -> None:
    """Each token of a prompt as a decode, in chunks of some lengths, and all tokens at once."""
    lens, heads, dim = [1, 290, 150], (4, 2), 16
    torch.manual_seed(0)
    case = make_case(lens, heads[1], dim, page, torch.float16, "cpu")
    q = torch.randn(sum(lens), heads[0] + 2 * heads[1], dim).half()[:, : heads[0]]
    begins = torch.tensor([0, *lens]).cumsum(0).int()
    about: dict[str, Any] = {"scale": dim**-0.5, "window": window}
    whole = torch.full(q.shape, float("nan"), dtype=q.dtype)
    where = (case.block_tables, case.slots, begins, case.context_lens)
    paged_prefill(q, case.kv, *where, **about, out=whole)
    for request, length in enumerate(lens):
        first = int(begins[request])
        for size in (7, 64, 100):
            for start in range(0, length, size):
                end = min(start + size, length)
                rows = slice(first + start, first + end)
                part = torch.full_like(q[rows], float("nan"))
                counts = torch.tensor([0, end - start]).int()
                slots, seen = case.slots[[request]], torch.tensor([end]).int()
                where = (case.block_tables, slots, counts, seen)
                paged_prefill(q[rows], case.kv, *where, **about, out=part)
                assert torch.equal(part, whole[rows]), (request, start, end)
    slots = case.slots.repeat_interleave(torch.tensor(lens))
    lengths = torch.cat([torch.arange(1, length + 1) for length in lens]).int()
    rows_of_all = Case(case.kv, case.block_tables, slots, lengths)
    for programs, pdl, block in ((3, False, 32), (700, True, 128)):
        work = _workspace(heads, dim, programs)
        picked = list(range(0, len(q), 3))
        decoded = _decode(rows_of_all, q, picked, work, pdl=pdl, block=block, window=window)
        assert torch.equal(decoded, whole[picked])


@interpreted
@pytest.mark.parametrize(("tail", "page"), [(40, 16), (150, 64)])
def test_a_prefill_has_the_bits_of_decodes(tail: int, page: int) -> None:
    """The last tokens of a prompt, all at once and each as the newest token of a request."""
    lens, heads, dim = [1, 129 + tail, 300], (4, 2), 16
    torch.manual_seed(0)
    case = make_case(lens, heads[1], dim, page, torch.float16, "cpu")
    counts = [min(tail, length) for length in lens]
    q = torch.randn(sum(counts), heads[0] + 2 * heads[1], dim).half()[:, : heads[0]]
    start = torch.tensor([0, *counts]).cumsum(0).int()
    prefilled = torch.full(q.shape, float("nan"), dtype=q.dtype)
    where = (case.block_tables, case.slots, start, case.context_lens)
    paged_prefill(q, case.kv, *where, scale=dim**-0.5, out=prefilled)
    visible = [torch.arange(n - new + 1, n + 1) for n, new in zip(lens, counts, strict=True)]
    slots = case.slots.repeat_interleave(torch.tensor(counts))
    rows = Case(case.kv, case.block_tables, slots, torch.cat(visible).int())
    decoded = _decode(rows, q, list(range(len(q))), _workspace(heads, dim, 16))
    assert torch.equal(decoded, prefilled)
