from __future__ import annotations

import torch

from layers.attention.base import AttentionSpec
from layers.attention.torch_sdpa import TorchAttention
from tests.contracts.attention import AttentionContract, Request, make_case


class GathersAll(TorchAttention):
    """As where torch has no FBGEMM."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self._in_bags = False


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


class TestWithoutBags(AttentionContract):
    make_backend = GathersAll
