"""The first and last kernel of a captured decode step against plain torch."""

from __future__ import annotations

import pytest
import torch
from engine.batch import SlotTables

from tests.kernels.plans import BLOCK_SIZE, check_prefill, check_staging, random_plans

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("size", [1, 7, 32, 100])
def test_gather_and_scatter(size: int) -> None:
    from layers.kernels.slots import (
        DecodeRows,
        gather_decode,
        gather_decode_reference,
        scatter_tokens,
        scatter_tokens_reference,
    )

    device, rows, width, block = torch.device("cuda"), 129, 96, 16
    slots = torch.randperm(rows - 1, device=device)[:size]
    slots[torch.rand(size, device=device) < 0.3] = rows - 1
    tables = [
        torch.randint(0, 4096, (rows, width), dtype=torch.int32, device=device),
        torch.randint(0, 999, (rows, width // block), dtype=torch.int32, device=device),
        torch.randint(0, width - 1, (rows,), device=device),
        torch.rand(rows, device=device),
        torch.randint(0, 2**62, (rows,), device=device),
    ]
    results = []
    for gather, scatter in (
        (gather_decode, scatter_tokens),
        (gather_decode_reference, scatter_tokens_reference),
    ):
        tokens, block_tables, computed, temperatures, seeds = (t.clone() for t in tables)
        out = DecodeRows.empty(size, device)
        gather(
            slots, tokens, block_tables, computed, temperatures, seeds, block_size=block, out=out
        )
        sampled = torch.arange(size, device=device) + 5000
        scatter(sampled, out, tokens, computed)
        results.append([*(getattr(out, name) for name in DecodeRows.__slots__), tokens, computed])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def _tables(device: str, slots: int) -> SlotTables:
    return SlotTables(slots, 3000, BLOCK_SIZE, torch.device(device))


@pytest.mark.parametrize("seed", range(4))
def test_staging_of_mixed_steps(seed: int) -> None:
    plans = random_plans(seed, 40, 2990, decodes=True)
    check_staging(_tables("cuda", 40), _tables("cpu", 40), plans)


@pytest.mark.parametrize("seed", range(4))
def test_staging_of_a_padded_prefill(seed: int) -> None:
    plans = [p for p in random_plans(seed, 4, 2990, decodes=False) if p.prefill]
    check_prefill(_tables("cuda", 4), _tables("cpu", 4), plans, 12_000)
