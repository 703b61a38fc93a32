"""A runner with captured steps gives what it gives without; graphs need no device here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.model_runner import LocalRunner
from layers.attention.base import AttentionBatch
from layers.attention.torch_sdpa import TorchAttention
from layers.step_rows import SlotTables, StepRows, fill_any_rows
from llm import LLM, SamplingParams
from tests.checkpoints import VOCAB_SIZE, Checkpoints

BLOCK_SIZE, NUM_BLOCKS = 16, 128


class PaddedAttention(TorchAttention):
    """The reference for batches with padding, which it leaves out."""

    def prepare(self, batch: AttentionBatch) -> Any:
        chunks = batch.num_prefills
        starts = batch.query_start.tolist() if chunks else []
        prepared = []
        for i, length in enumerate(batch.context_lens.tolist()):
            first = starts[i] if i < chunks else batch.num_prefill_tokens + i - chunks
            count = starts[i + 1] - first if i < chunks else 1
            alone = replace(
                batch,
                slots=batch.slots[i : i + 1],
                context_lens=batch.context_lens[i : i + 1],
                query_start=torch.tensor([0, count]),
                num_prefills=1,
                num_prefill_tokens=count,
                max_query_len=count,
            )
            if length:
                prepared.append((slice(first, first + count), super().prepare(alone)))
        return prepared

    def attend(self, q: Tensor, kv: Any, prepared: Any) -> Tensor:
        out = torch.zeros(q.shape[0], q.shape[1] * q.shape[2])
        for rows, alone in prepared:
            out[rows] = super().attend(q[rows], kv, alone)
        return out


@dataclass
class Captures:
    """Counts replays, and knows the number of blocks of each cache group."""

    num_blocks: list[int] = field(default_factory=list)
    replays: int = 0


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Have runners capture their steps."""
    made = Captures()

    def filled(tables: SlotTables, rows: StepRows) -> None:
        """As the kernel, but padding is stored in the last row of a cache, which nobody reads."""
        fill_any_rows(tables, rows)
        for mapping, count in zip(rows.slot_mapping, made.num_blocks, strict=True):
            mapping[mapping < 0] = count * BLOCK_SIZE - 1

    allocate = LocalRunner._allocate

    def allocated(runner: LocalRunner, num_blocks: list[int]) -> None:
        # Rehearsals run with fewer blocks than the steps after them.
        made.num_blocks = num_blocks
        allocate(runner, num_blocks)

    def captured(work: Callable[[], Any], pool: Any) -> Any:
        captured = work()

        def replay() -> None:
            made.replays += 1
            captured[1].copy_(work()[1])

        return SimpleNamespace(replay=replay, pool=lambda: None), captured

    # The reference has -1 in the rows for a moment, which a rehearsal beside it would take.
    def one(*args: Any, **options: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)

    monkeypatch.setattr("engine.compilation.ThreadPoolExecutor", one)
    monkeypatch.setattr(LocalRunner, "_allocate", allocated)
    monkeypatch.setattr("engine.graphs.captured", captured)
    monkeypatch.setattr("engine.model_runner.captures_graphs", lambda *args: True)
    for name in ("synchronize", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr("engine.device_state.reference.fill_rows", filled)
    return made


def _outputs(path: Path) -> tuple[list[list[dict[str, Any]]], list[int]]:
    """Outputs of plain requests, of those with options, of both together, and of plain ones again.

    Also returns the number of blocks of each cache group.
    """
    plain: list[dict[str, Any]] = [{"temperature": 0}, {"seed": 1}, {"temperature": 0, "seed": 2}]
    special: list[dict[str, Any]] = [
        {"temperature": 0, "repetition_penalty": 1.5},
        {"seed": 3, "top_k": 20, "logprobs": 2},
        {"temperature": 0, "prompt_logprobs": 1},
        {"seed": 4, "presence_penalty": 1.0, "logprobs": 0},
    ]
    options: dict[str, Any] = {"num_kvcache_blocks": NUM_BLOCKS, "kvcache_block_size": BLOCK_SIZE}
    options |= {"max_num_seqs": 6, "max_num_batched_tokens": 128, "max_model_len": 200}
    with LLM(path, device="cpu", attention_backend=PaddedAttention, **options) as llm:
        made: list[list[dict[str, Any]]] = []
        for kinds in (plain, special, plain + special, plain):
            params = [
                SamplingParams(max_tokens=9 + 2 * i, ignore_eos=True, **kind)
                for i, kind in enumerate(kinds)
            ]
            lengths = [4 + 19 * i for i in range(len(kinds))]
            prompts = [
                [(7 + 31 * i + 5 * j) % VOCAB_SIZE for j in range(length)]
                for i, length in enumerate(lengths)
            ]
            made.append([*llm.generate(prompts, params, use_tqdm=False)])
        return made, [group.num_blocks for group in llm.engine.runner.kv_groups]


def _entries(logprobs: list[dict[int, float] | None] | None) -> list[list[float]]:
    return [[*map(float, entry), *entry.values()] for entry in logprobs or [] if entry]


@pytest.mark.parametrize("name", ["", "mistral-window", "qwen3-windows"])
def test_captured_steps_and_others_make_one_output(
    shipped: Path, checkpoints: Checkpoints, request: pytest.FixtureRequest, name: str
) -> None:
    """Prompts whose log-probabilities are wanted are launched in between; options draw anew."""
    path = checkpoints[name] if name else shipped
    expected, num_blocks = _outputs(path)
    captures: Captures = request.getfixturevalue("captures")
    assert len(num_blocks) == 1 + (name == "qwen3-windows")
    got, _ = _outputs(path)
    assert captures.num_blocks == num_blocks
    assert captures.replays > 50
    for ours, theirs in zip(got, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one["token_ids"] == other["token_ids"]
            for kind in ("logprobs", "prompt_logprobs"):
                entries, wanted = _entries(one[kind]), _entries(other[kind])
                assert len(entries) == len(wanted)
                for entry, right in zip(entries, wanted, strict=True):
                    assert entry == pytest.approx(right, abs=1e-3)
