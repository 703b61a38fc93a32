"""Paged attention on a CUDA device: random shapes, poisoned caches and outputs, graph replay."""

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from layers.kernels.decode_launch import LARGE, MIDDLE, SMALL, DecodeConfig, decode_workspace
from layers.kernels.paged_decode import (
    paged_decode,
)
from layers.kernels.paged_prefill import (
    paged_prefill,
)
from tests.kernels.references import (
    paged_decode_reference,
    paged_prefill_reference,
)
from tests.kernels.test_paged_attention import make_case, relative_error

pytestmark = pytest.mark.gpu

PDL = torch.cuda.get_device_capability() >= (9, 0)
# Probabilities and outputs rounded to 16 bits, against float32: 3e-3 seen in bfloat16.
LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
CASES = [
    ((16, 8), 128, 256, torch.bfloat16),
    ((16, 8), 128, 16, torch.bfloat16),
    ((12, 2), 128, 256, torch.bfloat16),
    ((12, 2), 128, 64, torch.float16),
    ((14, 2), 64, 16, torch.bfloat16),
    ((8, 8), 64, 256, torch.float16),
    ((4, 1), 80, 64, torch.bfloat16),
    ((4, 2), 256, 64, torch.bfloat16),
]


@pytest.mark.parametrize(("heads", "dim", "page", "dtype"), CASES)
def test_decode(heads: tuple[int, int], dim: int, page: int, dtype: torch.dtype) -> None:
    for batch, longest in ((1, 4000), (3, 700), (19, 1500), (200, 300)):
        lens = [random.choice((0, 1, page, random.randint(1, longest))) for _ in range(batch)]
        lens[-1] = longest
        case = make_case(lens, heads[1], dim, page, dtype, "cuda")
        q = torch.randn(batch, heads[0] + 2 * heads[1], dim, device="cuda").to(dtype)
        q = q[:, : heads[0]]
        arguments = (
            q,
            case.kv,
            case.block_tables,
            case.slots,
            case.context_lens,
        )
        want = torch.full(q.shape, float("nan"), device="cuda")
        paged_decode_reference(*arguments, scale=dim**-0.5, out=want)
        workspace = decode_workspace(q.device, *heads, dim, 4096)
        for pdl in (False, PDL):
            out = torch.full(q.shape, float("nan"), dtype=dtype, device="cuda")
            paged_decode(
                *arguments,
                scale=dim**-0.5,
                max_context_len=4096,
                out=out,
                workspace=workspace,
                pdl=pdl,
            )
            assert relative_error(out, want) < LIMIT[dtype], (lens, pdl)
            assert not workspace.arrived.any()


@pytest.mark.parametrize("rows", [2, 4, 5])
@pytest.mark.parametrize(
    ("heads", "dim", "page", "dtype"), [*CASES, ((32, 1), 128, 256, torch.bfloat16)]
)
def test_decode_of_several_rows(
    heads: tuple[int, int], dim: int, page: int, dtype: torch.dtype, rows: int
) -> None:
    for batch, longest in ((1, 4000), (3, 700), (19, 1500), (120, 300)):
        # Some requests have fewer visible tokens than rows; pages and tiles end in between.
        lens = [
            random.choice((0, 1, rows - 1, rows, page, page + 1, 128 + rows // 2, longest // 2))
            for _ in range(batch)
        ]
        lens[-1] = longest
        case = make_case(lens, heads[1], dim, page, dtype, "cuda")
        q = torch.randn(batch * rows, heads[0] + 2 * heads[1], dim, device="cuda").to(dtype)
        q = q[:, : heads[0]]
        cache = (case.kv, case.block_tables, case.slots, case.context_lens)
        want = torch.full(q.shape, float("nan"), device="cuda")
        about: dict[str, Any] = {"scale": dim**-0.5, "rows_per_request": rows}
        paged_decode_reference(q, *cache, **about, out=want)
        visible = case.context_lens[:, None] + torch.arange(1 - rows, 1, device="cuda")
        workspace = decode_workspace(q.device, *heads, dim, 4096, rows_per_request=5)
        for pdl in (False, PDL):
            out = torch.full(q.shape, float("nan"), dtype=dtype, device="cuda")
            paged_decode(
                q,
                *cache,
                **about,
                max_context_len=4096,
                out=out,
                workspace=workspace,
                pdl=pdl,
            )
            assert relative_error(out, want) < LIMIT[dtype], (lens, pdl)
            assert not out[visible.flatten() <= 0].any()
            assert not workspace.arrived.any()


@pytest.mark.parametrize("page", [16, 64, 256])
@pytest.mark.parametrize("heads", [(16, 8), (12, 2), (32, 8)])
def test_decode_is_exact(heads: tuple[int, int], page: int) -> None:
    """Rows of 300 requests have the same bits in fewer of them, by other programs and launches."""
    dim, tail = 128, 150
    case = make_case([333, 2777], heads[1], dim, page, torch.bfloat16, "cuda")
    q = torch.randn(2 * tail, heads[0] + 2 * heads[1], dim, device="cuda").bfloat16()
    q = q[:, : heads[0]]
    # Request i has the first `lens[i]` tokens of one of two sequences: each has its last 150 ones.
    slots = case.slots.repeat_interleave(tail)
    ends = torch.arange(1 - tail, 1, device="cuda", dtype=torch.int32)
    lens = (case.context_lens[:, None] + ends).flatten()
    workspace = decode_workspace(q.device, *heads, dim, 4096, rows_per_request=5)
    for part in workspace[:3]:
        part.fill_(float("nan"))

    def decode(
        which: list[int], rows: int = 1, config: DecodeConfig | None = None, programs: int = 0
    ) -> torch.Tensor:
        """Rows `which`; with n rows of a request each n-th one is the last row of a request."""
        last, count = which[rows - 1 :: rows], programs or len(workspace.arrived)
        out = torch.full((len(which), heads[0], dim), float("nan"), device="cuda").bfloat16()
        paged_decode(
            *(q[which], case.kv, case.block_tables, slots[last], lens[last]),
            scale=dim**-0.5,
            max_context_len=4096,
            out=out,
            workspace=workspace._replace(arrived=workspace.arrived[:count]),
            rows_per_request=rows,
            pdl=PDL,
            config=config,
        )
        assert not workspace.arrived.any()
        return out.view(torch.int16)

    order = torch.randperm(2 * tail).tolist()
    base = torch.empty((2 * tail, heads[0], dim), dtype=torch.int16, device="cuda")
    base[order] = decode(order)
    for count in (7, 64, 300):
        for config in (None, SMALL, MIDDLE, LARGE):
            some = random.sample(range(2 * tail), count)
            assert torch.equal(decode(some, config=config), base[some]), (count, config)
        for programs in (4, 36, 200):
            assert torch.equal(decode(order[:count], programs=programs), base[order[:count]])
    for one in order[:40]:
        for config in (None, MIDDLE):
            assert torch.equal(decode([one], config=config), base[[one]]), (one, config)
        assert torch.equal(decode([one], programs=4 * heads[1]), base[[one]]), one
    for rows in (2, 5):
        for count in (1, 60):
            ends_at = random.sample(range(rows - 1, tail), count)
            some = [end - rows + 1 + row for end in ends_at for row in range(rows)]
            assert torch.equal(decode(some, rows), base[some]), (rows, count)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_decode_graph(batch: int) -> None:
    """A captured chain follows lengths and K/V that change between replays."""
    heads, dim, page = (16, 8), 128, 256
    case = make_case([1024] * batch, heads[1], dim, page, torch.bfloat16, "cuda")
    q = torch.randn(batch, heads[0], dim, device="cuda").bfloat16()
    out = torch.empty_like(q)
    workspace = decode_workspace(q.device, *heads, dim, 4096)
    arguments = (q, case.kv, case.block_tables, case.slots, case.context_lens)

    def chain() -> None:
        for _ in range(3):  # each call reads what the one before it wrote
            paged_decode(
                *arguments,
                scale=dim**-0.5,
                max_context_len=4096,
                out=out,
                workspace=workspace,
                pdl=PDL,
            )
            q.copy_(out)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for longest in (1024, 1, 700):
        lens = torch.randint(0, longest + 1, (batch,), device="cuda", dtype=torch.int32)
        case.context_lens.copy_(lens)
        start = torch.randn_like(q)
        q.copy_(start)
        graph.replay()
        want = start.float()
        for _ in range(3):
            step = (want.bfloat16(), *arguments[1:])
            want = torch.empty_like(want)
            paged_decode_reference(*step, scale=dim**-0.5, out=want)
        if lens.any():
            assert relative_error(out, want) < 3 * LIMIT[torch.bfloat16]
        assert not out[lens == 0].any()


@pytest.mark.parametrize(("heads", "dim", "page", "dtype"), CASES)
def test_prefill(heads: tuple[int, int], dim: int, page: int, dtype: torch.dtype) -> None:
    for count, longest in ((1, 128), (3, 700), (40, 300)):
        queries = [random.choice((0, 1, random.randint(1, longest))) for _ in range(count)]
        queries[-1] = longest
        lens = [new + random.choice((0, page, random.randint(1, 600))) for new in queries]
        case = make_case(lens, heads[1], dim, page, dtype, "cuda")
        rows = sum(queries)
        q = torch.randn(rows + 70, heads[0] + 2 * heads[1], dim, device="cuda").to(dtype)
        q = q[:, : heads[0]]
        start = torch.tensor([0, *queries]).cumsum(0).int().cuda()
        arguments = (
            q,
            case.kv,
            case.block_tables,
            case.slots,
            start,
            case.context_lens,
        )
        out = torch.full(q.shape, float("nan"), dtype=dtype, device="cuda")
        want = torch.full(q.shape, float("nan"), device="cuda")
        paged_prefill(*arguments, scale=dim**-0.5, out=out)
        paged_prefill_reference(*arguments, scale=dim**-0.5, out=want)
        assert relative_error(out[:rows], want[:rows]) < LIMIT[dtype], (queries, lens)
        assert out[rows:].isnan().all()
