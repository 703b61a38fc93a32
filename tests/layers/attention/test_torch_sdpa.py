from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layers.attention import sdpa_parts
from layers.attention.sdpa_parts import QUERY_ROWS
from layers.attention.torch_sdpa import TorchAttention
from tests.contracts.attention import AttentionContract, Case, Request, make_case


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the cache rows that are gathered, and finds the largest mask."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gathered = self.mask = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "index_select" in str(func) and out.dim() == 3:
            self.gathered += len(out)
        if isinstance(out, Tensor) and out.dtype == torch.bool:
            self.mask = max(self.mask, out.numel())
        self.calls += "scaled_dot_product" in str(func)
        return out


def _case(prefills: list[Request], decodes: list[Request], **options: Any) -> Case:
    return make_case(prefills, decodes, dtype=torch.float32, device=torch.device("cpu"), **options)


def _sizes(case: Case) -> _Sizes:
    """Compute a case, compare with the reference, and return the sizes."""
    backend = TorchAttention(case.spec)
    sizes = _Sizes()
    with sizes:
        out = backend.attend(case.q, case.kv, backend.prepare(case.batch))
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)
    return sizes


def test_a_long_request_pads_no_short_ones() -> None:
    decodes = [Request(20 + i) for i in range(30)] + [Request(9000)]
    sizes = _sizes(_case([], decodes))
    lengths = [request.context for request in decodes]
    assert sum(lengths) <= sizes.gathered <= 2 * sum(lengths)
    assert sizes.calls == 2
    # Short ones of a few lengths are one call: their padding takes less time than another call.
    assert _sizes(_case([], [Request(20), Request(200), Request(45)])).calls == 1


def test_decodes_that_see_equal_windows_are_one_call() -> None:
    sizes = _sizes(_case([], [Request(9000), Request(40), Request(60)], window=32))
    assert sizes.calls == 1
    assert sizes.gathered == 3 * 32


def test_a_call_for_decodes_gathers_a_bounded_number_of_cache_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sdpa_parts, "CACHE_ROWS", 1000)
    sizes = _sizes(_case([], [Request(150)] * 20))
    assert sizes.calls == 4  # of 6, 6, 6 and 2
    assert sizes.gathered == 20 * 150


@pytest.mark.parametrize("window", [None, 100])
def test_the_masks_of_a_chunk_exist_for_a_few_hundred_query_rows(window: int | None) -> None:
    num_rows, context = 1500, 2000
    assert QUERY_ROWS <= 512
    sizes = _sizes(_case([Request(context, num_rows)], [], window=window))
    seen = context if window is None else window + QUERY_ROWS
    assert 0 < sizes.mask <= QUERY_ROWS * seen
    assert sizes.calls == -(-num_rows // QUERY_ROWS)


class TestTorchAttention(AttentionContract):
    make_backend = TorchAttention

    def test_many_query_heads_of_one_kv_head(self) -> None:
        self.check(self.case(heads=16, kv_heads=2))

    def test_memory_that_stays_from_a_longer_step_to_a_shorter_one(self) -> None:
        """Pages between the requests are NaN, and so is what a buffer keeps of them."""
        cases = [
            make_case(
                [], [Request(n), Request(n - 9)], dtype=torch.float32, device=torch.device("cpu")
            )
            for n in (150, 20, 170)
        ]
        backend = TorchAttention(cases[0].spec)
        for case in cases:
            out = backend.attend(case.q, case.kv, backend.prepare(case.batch))
            torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)


class TestSmallParts(AttentionContract):
    """With blocks of few query rows, and many groups of decodes."""

    make_backend = TorchAttention

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sdpa_parts, "QUERY_ROWS", 7)
        monkeypatch.setattr(sdpa_parts, "PADDING", 0)
        monkeypatch.setattr(sdpa_parts, "CACHE_ROWS", 130)
