"""Paged attention on a CUDA device: random shapes, poisoned caches and outputs, graph replay."""

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from layers.kernels import hopper_decode_launch as hopper
from layers.kernels.decode_launch import LARGE, SMALL, DecodeConfig, decode_workspace
from layers.kernels.hopper_decode_launch import HopperDecodeConfig, hopper_decode
from layers.kernels.paged_decode import (
    paged_decode,
)
from layers.kernels.paged_prefill import (
    LARGE_HEAD,
    MEDIUM_HEAD,
    paged_prefill,
)
from tests.kernels.references import (
    paged_decode_reference,
    paged_prefill_reference,
)
from tests.kernels.test_paged_attention import Case, make_case, relative_error

pytestmark = pytest.mark.gpu

PDL = torch.cuda.get_device_capability() >= (9, 0)
# Probabilities and outputs rounded to 16 bits, against float32: 3e-3 seen in bfloat16.
LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
ODD = HopperDecodeConfig(stages=6, per_sm=1, least=3, unroll=1)
HOPPER = (hopper.FEW, hopper.MIDDLE, hopper.MANY, ODD)
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
        where = case.kv, case.block_tables, slots[last], lens[last]
        queries = q[which]
        torch.cuda.synchronize()  # with `pdl`, no kernel just before may write slots and lengths
        paged_decode(
            *(queries, *where),
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
        for config in (None, SMALL, LARGE):
            some = random.sample(range(2 * tail), count)
            assert torch.equal(decode(some, config=config), base[some]), (count, config)
        for programs in (4, 36, 200):
            assert torch.equal(decode(order[:count], programs=programs), base[order[:count]])
    for one in order[:40]:
        for config in (None, LARGE):
            assert torch.equal(decode([one], config=config), base[[one]]), (one, config)
        assert torch.equal(decode([one], programs=4 * heads[1]), base[[one]]), one
    for rows in (2, 5):
        for count in (1, 60):
            ends_at = random.sample(range(rows - 1, tail), count)
            some = [end - rows + 1 + row for end in ends_at for row in range(rows)]
            assert torch.equal(decode(some, rows), base[some]), (rows, count)
    start = torch.tensor([0, tail, 2 * tail], dtype=torch.int32, device="cuda")
    out = torch.full((2 * tail, heads[0], dim), float("nan"), device="cuda").bfloat16()
    where = (case.block_tables, case.slots, start, case.context_lens)
    paged_prefill(q, case.kv, *where, scale=dim**-0.5, out=out)
    assert torch.equal(out.view(torch.int16), base)


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("heads", "dim", "page", "dtype"),
    [
        *(((16, 8), 128, page, torch.bfloat16) for page in (16, 48, 64, 256)),
        ((12, 2), 128, 256, torch.bfloat16),
        ((32, 2), 128, 48, torch.float16),
        ((14, 2), 64, 16, torch.bfloat16),
        ((8, 8), 64, 256, torch.float16),
    ],
)
def test_hopper_decode(heads: tuple[int, int], dim: int, page: int, dtype: torch.dtype) -> None:
    """The kernel for Hopper has the bits of the one for all devices, for any division of work."""
    lens = [0, 1, 15, 16, 17, 127, 128, 129, 144, 1000, 0, 4000, 255, 256, 257]
    lens += [random.randint(1, 900) for _ in range(60)]
    case = make_case(lens, heads[1], dim, page, dtype, "cuda")
    q = torch.randn(len(lens), heads[0] + 2 * heads[1], dim, device="cuda").to(dtype)
    q = q[:, : heads[0]]
    workspace = decode_workspace(q.device, *heads, dim, 4096)
    for part in workspace[:3]:
        part.fill_(float("nan"))

    def decode(case: Case, which: list[int], programs: int = 0, **about: Any) -> torch.Tensor:
        out = torch.full((len(which), heads[0], dim), float("nan"), device="cuda").to(dtype)
        where = (case.kv, case.block_tables, case.slots[which], case.context_lens[which])
        arrived = workspace.arrived[: programs or len(workspace.arrived)]
        options: dict[str, Any] = {"pdl": PDL, "workspace": workspace._replace(arrived=arrived)}
        options |= {"scale": dim**-0.5, "max_context_len": 4096} | about
        get = hopper_decode if "config" in about and about["config"] in HOPPER else paged_decode
        queries = q[which]
        torch.cuda.synchronize()  # with `pdl`, no kernel just before may write slots and lengths
        get(queries, *where, out=out, **options)
        assert not workspace.arrived.any()
        return out.view(torch.int16)

    everyone = list(range(len(lens)))
    want = decode(case, everyone, config=LARGE)
    assert torch.equal(decode(case, everyone), want)
    assert torch.equal(decode(case, everyone, pdl=False), want)
    for config in HOPPER:
        for count in (1, 9, 40):
            some = random.sample(everyone, count)
            assert torch.equal(decode(case, some, config=config), want[some]), (config, count)
        for programs in (4, 28, 132, 4 * len(lens) * heads[1]):
            got = decode(case, everyone, programs, config=config)
            assert torch.equal(got, want), (config, programs)
    for one in everyone:
        assert torch.equal(decode(case, [one]), want[[one]]), lens[one]
        assert torch.equal(decode(case, [one], 8 * heads[1]), want[[one]]), lens[one]
    for other in {16, 48, 64, 256} - {page}:
        assert torch.equal(decode(_in_pages(case, other), everyone), want), other


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("heads", [(16, 8), (12, 2), (32, 8)])
def test_hopper_decode_under_load(heads: tuple[int, int]) -> None:
    """A busy GPU changes no bit: copies overwrite no keys or values that are still being read.

    Without the fence in hopper_decode.py, 13 to 75 of 100 calls like these had other bits.
    """
    dim, batch = 128, 300
    case = make_case([333, 2777], heads[1], dim, 64, torch.bfloat16, "cuda")
    q = torch.randn(batch, heads[0], dim, device="cuda").bfloat16()
    slots = torch.arange(batch, device="cuda") % 2
    lens = case.context_lens[slots] - torch.arange(batch, device="cuda", dtype=torch.int32) // 2
    workspace = decode_workspace(q.device, *heads, dim, 4096)

    def decode(config: Any, order: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(q, float("nan"))
        where = (case.kv, case.block_tables, case.slots[slots[order]], lens[order])
        queries = q[order]
        torch.cuda.synchronize()  # with `pdl`, no kernel just before may write slots and lengths
        get = hopper_decode if config in HOPPER else paged_decode
        about: dict[str, Any] = {"scale": dim**-0.5, "max_context_len": 4096, "pdl": PDL}
        get(queries, *where, out=out, workspace=workspace, config=config, **about)
        return out.view(torch.int16)

    want = decode(LARGE, torch.arange(batch, device="cuda"))
    for config in HOPPER:
        for _ in range(25):
            order = torch.randperm(batch, device="cuda")
            assert torch.equal(decode(config, order), want[order]), config


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_decode_graph(batch: int) -> None:
    """A captured chain follows lengths and K/V that change between replays."""
    heads, dim, page = (16, 8), 128, 256
    case = make_case([1024] * batch, heads[1], dim, page, torch.bfloat16, "cuda")
    q = torch.randn(batch, heads[0], dim, device="cuda").bfloat16()
    out = torch.empty_like(q)
    workspace = decode_workspace(q.device, *heads, dim, 4096)
    arguments = (q, case.kv, case.block_tables, case.slots, case.context_lens)

    def chain(config: DecodeConfig | None = None) -> None:
        for _ in range(3):  # each call reads what the one before it wrote
            paged_decode(
                *arguments,
                scale=dim**-0.5,
                max_context_len=4096,
                out=out,
                workspace=workspace,
                pdl=PDL,
                config=config,
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
        # The kernel for all devices, without a graph, has the same bits.
        got, q[:] = out.clone(), start
        chain(LARGE)
        assert torch.equal(out, got)


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
        # The kernel for all devices gives the same bits as the one that was chosen.
        other = torch.empty_like(out)
        config = LARGE_HEAD if dim > 128 else MEDIUM_HEAD
        paged_prefill(*arguments, scale=dim**-0.5, out=other, config=config)
        assert torch.equal(out[:rows], other[:rows]), (queries, lens)


def _in_pages(case: Case, page: int) -> Case:
    """The same keys and values in pages of another size, with poison around them."""
    old = case.kv.k.shape[1]
    (heads, dim), lens = case.kv.k.shape[2:], case.context_lens.tolist()
    same = make_case(lens, heads, dim, page, case.kv.k.dtype, "cuda")
    for p, length in enumerate(case.context_lens.tolist()):
        at = torch.arange(length, device="cuda")
        source = case.block_tables[case.slots[p], at // old].long() * old + at % old
        target = same.block_tables[same.slots[p], at // page].long() * page + at % page
        same.kv.flat[target] = case.kv.flat[source]
    return same


@pytest.mark.parametrize(("heads", "dim", "page", "dtype"), CASES)
def test_prefill_is_exact(heads: tuple[int, int], dim: int, page: int, dtype: torch.dtype) -> None:
    """A query has the same bits in any chunk, alone and among others, and with any page size."""
    lens, tail = [333, 1111, 2777], 300
    case = make_case(lens, heads[1], dim, page, dtype, "cuda")
    q = torch.randn(3 * tail, heads[0] + 2 * heads[1], dim, device="cuda").to(dtype)
    q = q[:, : heads[0]]

    def attend(case: Case, parts: list[tuple[int, int, int]]) -> torch.Tensor:
        """Attention of rows `begin` to `end` of the tails of sequences: (sequence, begin, end)."""
        rows = [p * tail + row for p, begin, end in parts for row in range(begin, end)]
        start = torch.tensor([0, *(end - begin for _, begin, end in parts)]).cumsum(0).int()
        seen = [lens[p] - tail + end for p, _, end in parts]
        out = torch.full((len(rows), heads[0], dim), float("nan"), dtype=dtype, device="cuda")
        return paged_prefill(
            *(q[rows], case.kv, case.block_tables, case.slots[[p for p, _, _ in parts]]),
            *(start.cuda(), torch.tensor(seen, dtype=torch.int32, device="cuda")),
            scale=dim**-0.5,
            out=out,
        )

    whole = [(p, 0, tail) for p in range(3)]
    want = attend(case, whole)
    assert torch.equal(attend(case, whole), want)
    for p in range(3):
        assert torch.equal(attend(case, whole[p : p + 1]), want[p * tail : (p + 1) * tail])
    for chunk in (1, 5, 64):
        parts = [
            (p, begin, min(begin + chunk, tail))
            for p in range(3)
            for begin in range(0, tail, chunk)
        ]
        random.shuffle(parts)
        rows = [p * tail + row for p, begin, end in parts for row in range(begin, end)]
        assert torch.equal(attend(case, parts), want[rows]), chunk
    for other in {16, 48, 64, 256} - {page}:
        assert torch.equal(attend(_in_pages(case, other), whole), want), other


@pytest.mark.parametrize("window", [1, 20, 128, 1000])
@pytest.mark.parametrize(("heads", "dim", "page", "dtype"), CASES)
def test_windows(
    heads: tuple[int, int], dim: int, page: int, dtype: torch.dtype, window: int
) -> None:
    """Decodes and chunks: near the reference, and with the same bits by the Triton kernels.

    Pages before the windows are NaN, and their entries in the tables lead out of the cache.
    """
    scale, config = dim**-0.5, LARGE_HEAD if dim > 128 else MEDIUM_HEAD
    about: dict[str, Any] = {"scale": scale, "window": window}
    for lens in ([4000], [1, 0, 700, 129, 128, 127], [300] * 70):
        first_reads = [max(0, length - window) for length in lens]
        case = make_case(lens, heads[1], dim, page, dtype, "cuda", first_reads)
        q = torch.randn(len(lens), heads[0] + 2 * heads[1], dim, device="cuda").to(dtype)
        q = q[:, : heads[0]]
        cache = (case.kv, case.block_tables, case.slots, case.context_lens)
        want = torch.full(q.shape, float("nan"), device="cuda")
        paged_decode_reference(q, *cache, **about, out=want)
        workspace = decode_workspace(q.device, *heads, dim, 4096)
        outs = []
        variants: list[dict[str, Any]] = [{}, {"pdl": PDL}, {"config": SMALL}]
        for options in variants:
            out = torch.full(want.shape, float("nan"), dtype=dtype, device="cuda")
            options |= about | {"max_context_len": 4096, "workspace": workspace}
            paged_decode(q, *cache, out=out, **options)
            assert not workspace.arrived.any()
            outs.append(out)
        assert relative_error(outs[0], want) < LIMIT[dtype], lens
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
    # With a window of 128, the window of the last one begins one token behind a split's border.
    queries, before = [300, 1, 0, 70, 128, 1], [0, 900, 5, 257, 1024, 256]
    lens = [new + old for new, old in zip(queries, before, strict=True)]
    first_reads = [max(0, old - window + 1) for old in before]
    case = make_case(lens, heads[1], dim, page, dtype, "cuda", first_reads)
    q = torch.randn(sum(queries), heads[0] + 2 * heads[1], dim, device="cuda").to(dtype)
    q = q[:, : heads[0]]
    start = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
    where = (case.kv, case.block_tables, case.slots, start, case.context_lens)
    want = torch.full(q.shape, float("nan"), device="cuda")
    paged_prefill_reference(q, *where, **about, out=want)
    outs = [torch.full(q.shape, float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
    paged_prefill(q, *where, **about, out=outs[0])
    paged_prefill(q, *where, **about, out=outs[1], config=config)
    assert relative_error(outs[0], want) < LIMIT[dtype]
    assert torch.equal(outs[0], outs[1])
