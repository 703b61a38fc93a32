"""Which plans run as graphs, and where their logits and tokens lie; graphs need no device here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.device_state import DeviceState, Staging
from engine.graphs import MAX_CHUNKS, StepGraphs, decode_sizes
from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepPlan
from layers.step_rows import SlotTables, StepRows, fill_any_rows
from sampling_params import SamplingParams

CPU = torch.device("cpu")
VOCAB = 97
PARAMS = SamplingParams(temperature=0)


class _Graph:
    """A graph whose replay does the work again, and stores the states where they were captured."""

    def __init__(self, work: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._work, self.made = work, work()

    def replay(self) -> None:
        self.made[1].copy_(self._work()[1])

    def pool(self) -> None:
        return None


def captured(
    work: Callable[[], tuple[Tensor, Tensor]], pool: Any
) -> tuple[_Graph, tuple[Tensor, Tensor]]:
    graph = _Graph(work)
    return graph, graph.made


class _Steps:
    """Graphs of a step in which the token after t at position p is 3 * t + p, and its logits too.

    Attributes:
        ran: number of rows, and whether they are chunks, of every step that has run.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        num_slots: int = 24,
        max_tokens: int = 4096,
        weights_per_layer: int = 1 << 20,
        keeps_target: bool = True,
    ) -> None:
        monkeypatch.setattr("engine.graphs.captured", captured)
        staging = Staging(CPU)
        self.state = DeviceState(SlotTables.zeros(num_slots, 4100, 16, CPU), staging)
        self.ran: list[tuple[int, bool]] = []
        self._keeps_target = keeps_target
        parts = self._step, self.state
        self.graphs = StepGraphs(*parts, max_tokens, weights_per_layer)

    def _step(self, rows: StepRows, out: Tensor | None) -> tuple[Tensor, Tensor]:
        self.ran.append((len(rows.input_ids), rows.num_chunks > 0))
        fill_any_rows(self.state.tables, rows)
        wanted = rows.sampled.rows
        tokens = (3 * rows.input_ids[wanted] + rows.positions[wanted]) % VOCAB
        logits = torch.nn.functional.one_hot(tokens, VOCAB).float()
        self.state.write(rows.sampled, tokens)
        states = rows.positions[wanted].float().unsqueeze(1)
        kept = out.copy_(logits) if out is not None and self._keeps_target else logits
        return kept, states


def _plan(tokens: int = 5, decode: tuple[int, ...] = (3, 4)) -> StepPlan:
    chunks = (PrefillChunk(0, 0, tokens - 1, True), PrefillChunk(1, 0, 1, False))
    return StepPlan(7, (), (), chunks if tokens else (), decode)


@pytest.mark.parametrize("keeps_target", [True, False])
def test_what_a_plan_samples_is_one_stretch_in_the_plan_s_order(
    monkeypatch: pytest.MonkeyPatch, keeps_target: bool
) -> None:
    """Chunks with and without a sample and decodes, of requests that a second table knows too."""
    steps = _Steps(monkeypatch, num_slots=9, keeps_target=keeps_target)
    eager = DeviceState(SlotTables.zeros(9, 4100, 16, CPU), Staging(CPU))
    steps.graphs.capture()
    known = {slot: [slot + 1, 5, 2 * slot, 7] for slot in range(9)}
    news = tuple(NewRequest(s, s, tuple(ids), PARAMS, s) for s, ids in known.items())
    updates = tuple(BlockUpdate(s, 0, (4 * s, 4 * s + 1)) for s in range(9))
    chunks = {slot: PrefillChunk(slot, 0, 4, True) for slot in range(9)}
    plans = [
        StepPlan(0, news, updates, (chunks[3], chunks[1])),
        StepPlan(1, prefill=(PrefillChunk(5, 0, 3, False), chunks[2]), decode=(1, 3)),
        StepPlan(2, prefill=(PrefillChunk(5, 3, 1, True),), decode=(3,)),
        StepPlan(3, decode=(2, 5, 1)),
        StepPlan(4, decode=(2, 5, 1)),
        # As many decodes, of other slots.
        StepPlan(4, decode=(5, 3, 1)),
        StepPlan(5, prefill=(PrefillChunk(6, 0, 2, False),)),
        StepPlan(6, decode=(3,)),
        StepPlan(7, prefill=(chunks[0], PrefillChunk(6, 2, 2, True)), decode=(5, 2, 1, 3)),
    ]
    computed = dict.fromkeys(known, 0)
    for plan in plans:
        for state in (steps.state, eager):
            state.apply(plan)
        assert steps.graphs.serves(plan)
        made, sampled = steps.graphs.replay(plan)
        rows = eager.rows(plan)
        expected = []
        for chunk in plan.prefill:
            computed[chunk.slot] += chunk.num_tokens
        for slot in plan.decode:
            computed[slot] += 1
        for slot in plan.sampled_slots:
            position = computed[slot] - 1
            token = (3 * known[slot][position] + position) % VOCAB
            expected.append(token)
            known[slot].append(token)
        eager.write(rows.sampled, torch.tensor(expected, dtype=torch.int64))
        assert sampled.tokens.tolist() == expected
        assert made.logits.argmax(1).tolist() == expected
        at = [computed[slot] - 1 for slot in plan.sampled_slots]
        assert torch.cat([*made.states]).flatten().tolist() == at
        for name in ("slots", "positions", "temperatures", "seeds"):
            got, wanted = getattr(sampled, name), getattr(rows.sampled, name)
            assert got.tolist() == wanted.tolist(), name
        assert torch.equal(steps.state.tables.tokens[:-1], eager.tables.tokens[:-1])
        assert torch.equal(steps.state.tables.num_computed[:-1], eager.tables.num_computed[:-1])


def test_a_request_that_is_not_decoded_any_more_is_not_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of three decodes replays the graph of four, whose fourth one ran before."""
    steps = _Steps(monkeypatch)
    steps.graphs.capture()
    news = tuple(NewRequest(slot, slot, (slot, 5), PARAMS, 0) for slot in range(4))
    chunks = tuple(PrefillChunk(slot, 0, 2, True) for slot in range(4))
    steps.state.apply(StepPlan(0, news))
    for plan in (
        StepPlan(0, prefill=chunks),
        StepPlan(1, decode=(0, 1, 2, 3)),
        StepPlan(2, decode=(2, 0, 1)),
    ):
        steps.graphs.replay(plan)
    assert steps.state.tables.num_computed[:4].tolist() == [4, 4, 4, 3]


def test_a_plan_runs_in_the_smallest_steps_that_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = _Steps(monkeypatch)
    steps.graphs.capture()
    for tokens, decode, ran in (
        (5, (3, 4), [(128, True), (2, False)]),
        (129, (), [(256, True)]),
        (4096, (), [(4096, True)]),
        (0, tuple(range(5)), [(8, False)]),
        (0, tuple(range(17)), [(24, False)]),
    ):
        steps.ran.clear()
        steps.graphs.replay(_plan(tokens, decode))
        assert steps.ran == ran


def test_beside_decodes_prefills_are_captured_while_launching_them_takes_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def serves(weights_per_layer: int, plan: StepPlan) -> bool:
        steps = _Steps(monkeypatch, num_slots=2, weights_per_layer=weights_per_layer)
        steps.graphs.capture()
        return steps.graphs.serves(plan)

    assert serves(16_000_000, _plan(4096))
    assert not serves(16_000_000, _plan(4097))
    # 0.4 ms are 110 us for the weights once more, and 396 tokens at 600 TFLOP/s.
    assert serves(220_000_000, _plan(395))
    assert not serves(220_000_000, _plan(397))
    assert serves(220_000_000, _plan(4096, decode=()))
    assert not serves(1 << 30, _plan())
    assert serves(1 << 30, _plan(tokens=0))


def test_more_chunks_than_a_graph_has_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = _Steps(monkeypatch, num_slots=2)
    steps.graphs.capture()
    chunks = tuple(PrefillChunk(i, 0, 1, True) for i in range(MAX_CHUNKS + 1))
    assert steps.graphs.serves(StepPlan(0, prefill=chunks[1:]))
    assert not steps.graphs.serves(StepPlan(0, prefill=chunks))


@pytest.mark.parametrize("max_tokens", [64, 127, 128, 300])
def test_a_small_token_budget_has_small_steps(
    monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    steps = _Steps(monkeypatch, num_slots=2, max_tokens=max_tokens)
    steps.graphs.capture()
    largest = max_tokens // 128 * 128
    assert max((rows for rows, chunks in steps.ran if chunks), default=0) == largest
    assert not steps.graphs.serves(_plan(largest + 1, ()))
    assert steps.graphs.serves(_plan(0))


def test_nothing_is_served_before_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = _Steps(monkeypatch)
    assert not steps.graphs.serves(_plan(tokens=0))
    for run in steps.graphs.rehearsals():
        run()
    chunks = [(768, True), (1536, True), (2176, True), (3712, True)]
    assert sorted(steps.ran) == [(1, False), (16, False), (24, False), *chunks]
    assert (steps.state.tables.tokens[:-1] == 0).all()
    assert (steps.state.tables.num_computed[:-1] == 0).all()


def test_rehearsals_run_each_number_of_rows_that_has_kernels_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = _Steps(monkeypatch, num_slots=300, max_tokens=1024)
    for run in steps.graphs.rehearsals():
        run()
    assert [rows for rows, _ in steps.ran] == [768, 1, 16, 24, 40, 80, 208, 288]


@pytest.mark.parametrize(
    "max_num_seqs", [1, 2, 3, 7, 8, 9, 16, 63, 64, 65, 100, 256, 257, 512, 700]
)
def test_every_number_of_decodes_has_a_step_and_little_padding(max_num_seqs: int) -> None:
    sizes = decode_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for size in range(1, max_num_seqs + 1):
        padded = next(s for s in sizes if s >= size)
        assert padded < 2 * size or padded <= 8
        if size >= 64:
            assert padded <= 1.25 * size
