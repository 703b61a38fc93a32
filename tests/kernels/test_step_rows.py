"""The kernels between per-slot tables and a step's rows, on a CPU through Triton's interpreter.

Collected normally, this file offers one test that starts the others in a process of their own.
Outputs are poisoned before a kernel runs, and so is the tables' last row, which is padding: a
kernel may neither read it nor write to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.device_state import DeviceState, Staging
from engine.graphs import StepGraphs
from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepPlan
from layers import step_rows as reference
from layers.rotary import Rotation
from layers.step_rows import SampledRows, SlotTables, StepRows
from memory.kv_cache import KVLayer
from sampling_params import SamplingParams
from tests.kernels.interpreter import (
    HAS_TRITON,
    INTERPRET,
    interpreted,
    patch_interpreter,
    run_in_interpreter,
    starts_interpreter,
)
from tests.kernels.plans import check_rows, random_plans

if INTERPRET and HAS_TRITON:
    from layers.kernels import step_rows as kernels
    from layers.kernels.rowwise import qk_norm_rope_store

    patch_interpreter()

CPU = torch.device("cpu")
BLOCK_SIZE, WIDTH, NUM_SLOTS = 8, 96, 40
GROUPS = 2  # cache groups, each of which has block tables and a slot mapping
POISON = -7
# A read at this position would leave the tables, and the process.
FAR = 1 << 40
PER_REQUEST = ("input_ids", "positions", "slots", "context_lens", "query_start")
PER_SAMPLED = ("rows", "slots", "positions", "temperatures", "seeds")


@starts_interpreter
def test_in_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.mark.slow
@starts_interpreter
def test_in_interpreter_many_seeds() -> None:
    run_in_interpreter(__file__, "slow")


def _seeds(few: int) -> list[Any]:
    """A few, and many more that are slow."""
    more = range(few, few + 50)
    return [*range(few), *(pytest.param(seed, marks=pytest.mark.slow) for seed in more)]


def _random_tables(generator: torch.Generator) -> SlotTables:
    """Block ids are so large that most rows of the cache are beyond 2^31."""

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    rows = NUM_SLOTS + 1
    groups = (integers(0, 2**31 - 1, rows, WIDTH // BLOCK_SIZE).int() for _ in range(GROUPS))
    made = SlotTables(
        tokens=integers(0, 150_000, rows, WIDTH).int(),
        block_tables=tuple(groups),
        num_computed=integers(0, WIDTH - 8, rows),
        temperatures=torch.rand(rows, generator=generator),
        seeds=integers(0, 2**63 - 1, rows, 2),
        block_size=BLOCK_SIZE,
    )
    made.tokens[-1], made.num_computed[-1] = POISON, FAR
    for table in made.block_tables:
        table[-1] = POISON
    made.temperatures[-1], made.seeds[-1] = float("nan"), POISON
    return made


def _columns(tables: SlotTables) -> list[str]:
    return [f.name for f in fields(tables) if f.name not in ("block_size", "block_tables")]


def _copied(tables: SlotTables) -> SlotTables:
    groups = tuple(table.clone() for table in tables.block_tables)
    copies = {name: getattr(tables, name).clone() for name in _columns(tables)}
    return replace(tables, block_tables=groups, **copies)


def _assert_equal(ours: SlotTables, theirs: SlotTables, *, padding: bool = True) -> None:
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in _columns(ours)]
    groups = zip(ours.block_tables, theirs.block_tables, strict=True)
    for name, got, expected in (*pairs, *(("block_tables", *group) for group in groups)):
        assert torch.equal(got[:-1], expected[:-1]), name
        if padding:
            torch.testing.assert_close(got[-1], expected[-1], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def _few_tokens_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that requests of some tens of tokens take several programs, as those of 1,024 do."""
    if INTERPRET:
        monkeypatch.setattr(kernels, "_MANY", 16)


@interpreted
@pytest.mark.usefixtures("_few_tokens_a_program")
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("seed", _seeds(3))
def test_enter_requests(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = _random_tables(generator)
    by_reference, by_hand = _copied(tables), _copied(tables)
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:count]
    lengths = torch.randint(1, WIDTH, (count,), generator=generator)
    # The edges of a program's share, and the longest there can be.
    lengths[: min(count, 4)] = torch.tensor([WIDTH, 16, 17, 1])[:count]
    firsts = lengths.cumsum(0) - lengths
    seeds = torch.randint(0, 2**63 - 1, (count, 2), generator=generator)
    temperatures = torch.rand(count, generator=generator)
    ids = torch.randint(0, 150_000, (int(lengths.sum()),), generator=generator).int()
    header = torch.stack((slots, firsts, lengths, *seeds.T))
    for ops, changed in ((kernels, tables), (reference, by_reference)):
        ops.enter_requests(changed, header, temperatures, ids, int(lengths.max()))
    for i, slot in enumerate(slots.tolist()):
        by_hand.tokens[slot, : lengths[i]] = ids[firsts[i] : firsts[i] + lengths[i]]
        by_hand.temperatures[slot], by_hand.seeds[slot] = temperatures[i], seeds[i]
    _assert_equal(tables, by_hand)
    _assert_equal(by_reference, by_hand)


@dataclass(frozen=True)
class Request:
    """A request's part of a step.

    Attributes:
        start: first position; None for the next ones of a decode.
        sampled: how many of its last rows; with None it has no place among the sampled ones.
    """

    slot: int
    start: int | None
    count: int
    sampled: int | None


def _random_step(generator: torch.Generator, per_decode: int) -> list[Request]:
    """Chunks with and without a sample, decodes, and padding of all kinds."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    slots = torch.randperm(NUM_SLOTS, generator=generator).tolist()
    made = []
    for i, count in enumerate((1, 16, 17, 60, integer(1, 90))):
        sampled = (1, 0, None)[integer(0, 2)]
        made.append(Request(slots[i], integer(0, WIDTH - count), count, sampled))
    # As of a captured prefill with fewer requests than it was made for.
    made += [Request(NUM_SLOTS, 0, 0, 0), Request(NUM_SLOTS, 0, integer(1, 40), None)]
    return made + _random_decodes(generator, slots[5 : 5 + integer(0, 9)], per_decode)


def _random_decodes(generator: torch.Generator, slots: list[int], count: int) -> list[Request]:
    """Decodes, three in ten of them padding."""
    padding = torch.rand(len(slots), generator=generator) < 0.3
    chosen = [NUM_SLOTS if p else s for s, p in zip(slots, padding.tolist(), strict=True)]
    return [Request(slot, None, count, count) for slot in chosen]


def _unset_rows(step: list[Request], per_decode: int) -> StepRows:
    """Poisoned rows with the step's header, which is a part of a wider one."""
    columns, place, first = [], 0, 0
    for r in step:
        start = -1 if r.start is None else r.start
        has_place = r.sampled is not None
        columns.append((r.slot, start, r.count, first, place if has_place else -1, r.sampled or 0))
        first += r.count
        place += max(r.sampled or 0, 1) if has_place else 0
    wide = torch.full((6, len(step) + 3), FAR)
    wide[:, : len(step)] = torch.tensor(columns).T
    chunks = [r for r in step if r.start is not None]
    rows = StepRows.empty(
        wide[:, : len(step)],
        first + 5,
        place + 2,
        GROUPS,
        num_chunks=len(chunks),
        num_chunk_rows=sum(r.count for r in chunks),
        longest_chunk=max((r.count for r in chunks), default=0),
        rows_per_decode=per_decode,
    )
    for tensor in (*rows.slot_mapping, *(getattr(rows, name) for name in PER_REQUEST)):
        tensor.fill_(POISON)
    for name in PER_SAMPLED:
        getattr(rows.sampled, name).fill_(POISON)
    return rows


def _check_rows(rows: StepRows, step: list[Request], before: SlotTables) -> SlotTables:
    """Compare with what Python makes of the step; returns the tables as they should be now."""
    after = _copied(before)
    per_request: dict[str, list[Any]] = {name: [] for name in PER_REQUEST}
    per_sampled: dict[str, list[Any]] = {name: [] for name in PER_SAMPLED}
    per_request["query_start"].append(0)
    mappings: list[list[int]] = [[] for _ in rows.slot_mapping]
    for r in step:
        padding = r.slot == NUM_SLOTS
        start = int(before.num_computed[r.slot]) if r.start is None else r.start
        at = range(start, start + r.count)
        nothing = [0] * r.count
        per_request["input_ids"] += nothing if padding else before.tokens[r.slot, at].tolist()
        per_request["positions"] += nothing if padding else at
        for mapping, table in zip(mappings, before.block_tables, strict=True):
            blocks = [0 if padding else int(table[r.slot, p // BLOCK_SIZE]) for p in at]
            pages = [b * BLOCK_SIZE + p % BLOCK_SIZE for b, p in zip(blocks, at, strict=True)]
            mapping += [-1] * r.count if padding else pages
        per_request["slots"].append(r.slot)
        per_request["context_lens"].append(0 if padding else at.stop)
        if not padding:
            after.num_computed[r.slot] = at.stop
        last = per_request["query_start"][-1] + r.count
        per_request["query_start"].append(last)
        for i in range(0 if r.sampled is None else max(r.sampled, 1)):
            entry: tuple[Any, ...] = (0, NUM_SLOTS, 0, 0.0, [0, 0])
            if not padding and r.sampled:
                behind = r.sampled - i
                keys = float(before.temperatures[r.slot]), before.seeds[r.slot].tolist()
                entry = (last - behind, r.slot, at.stop - behind + 1, *keys)
            for name, value in zip(PER_SAMPLED, entry, strict=True):
                per_sampled[name].append(value)
    for got, values in zip(rows.slot_mapping, mappings, strict=True):
        assert got.tolist() == values + [POISON] * (len(got) - len(values))
    for part, wanted in ((rows, per_request), (rows.sampled, per_sampled)):
        for name, values in wanted.items():
            got = getattr(part, name).tolist()
            unset = [POISON, POISON] if name == "seeds" else POISON
            assert got == values + [unset] * (len(got) - len(values)), name
    return after


@interpreted
@pytest.mark.usefixtures("_few_tokens_a_program")
@pytest.mark.parametrize("per_decode", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["mixed", "decodes"])
@pytest.mark.parametrize("seed", _seeds(3))
def test_fill_rows(seed: int, kind: str, per_decode: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = _random_tables(generator)
    if kind == "mixed":
        step = _random_step(generator, per_decode)
    else:
        slots = torch.randperm(NUM_SLOTS, generator=generator).tolist()
        step = _random_decodes(generator, slots[: 1 + 13 * seed], per_decode)
    before = _copied(tables)
    rows = _unset_rows(step, per_decode)
    kernels.fill_rows(tables, rows)
    _assert_equal(tables, _check_rows(rows, step, before))
    # The reference reads the row of padding, at position 0.
    by_reference, rows = _copied(before), _unset_rows(step, per_decode)
    reference.fill_any_rows(by_reference, rows)
    _assert_equal(by_reference, _check_rows(rows, step, before), padding=False)


@pytest.mark.parametrize("seed", _seeds(5))
def test_rows_of_decodes_alone_by_fewer_operations(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = _random_tables(generator)
    slots = torch.randperm(NUM_SLOTS, generator=generator).tolist()[: 1 + 9 * seed]
    step = [Request(slot, None, 1, 1) for slot in slots]
    before, made = _copied(tables), _unset_rows(step, 1)
    rows = replace(
        made,
        sampled=made.sampled[: len(slots)],
        slot_mapping=tuple(mapping[: len(slots)] for mapping in made.slot_mapping),
        **{name: getattr(made, name)[: len(slots)] for name in PER_REQUEST[:2]},
    )
    reference.fill_rows(tables, rows)
    _assert_equal(tables, _check_rows(rows, step, before))


# One row, a program's 32 but for one, all of them, and more.
@interpreted
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 40])
@pytest.mark.parametrize("seed", _seeds(3))
def test_write_tokens(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = _random_tables(generator)
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:size]
    slots[torch.rand(size, generator=generator) < 0.3] = NUM_SLOTS
    sampled = SampledRows.empty(size + 3, CPU)
    sampled.slots[:size] = slots
    sampled.positions[:size] = torch.where(slots == NUM_SLOTS, FAR, tables.num_computed[slots])
    sampled.tokens.fill_(POISON)
    drawn = torch.randint(0, 2**31, (size,), generator=generator)
    expected, by_reference = _copied(tables), _copied(tables)
    columns = slots.tolist(), sampled.positions[:size].tolist(), drawn.tolist()
    for slot, position, token in zip(*columns, strict=True):
        if slot != NUM_SLOTS:
            expected.tokens[slot, position] = token
    kernels.write_tokens(tables, sampled[:size], drawn)
    _assert_equal(tables, expected)
    assert sampled.tokens.tolist() == [*drawn.tolist(), POISON, POISON, POISON]
    sampled.positions[:size][slots == NUM_SLOTS] = 0
    reference.write_tokens(by_reference, sampled[:size], drawn)
    _assert_equal(by_reference, expected, padding=False)


def _state(kernels: bool, num_slots: int = 5) -> DeviceState:
    tables = SlotTables.zeros(num_slots, WIDTH, 16, CPU, GROUPS)
    return DeviceState(tables, Staging(CPU), kernels)


@interpreted
@pytest.mark.usefixtures("_few_tokens_a_program")
@pytest.mark.parametrize("seed", _seeds(4))
def test_rows_of_random_plans(seed: int) -> None:
    check_rows(_state(True), _state(False), random_plans(seed, 5, 90, groups=GROUPS))


def _store(values: Tensor, slot_mapping: Tensor, kv: KVLayer) -> None:
    """Write [T] values as K and V of their positions, by the kernel that the models use."""
    rotation = Rotation(torch.zeros_like(slot_mapping), torch.ones(1, 1), torch.zeros(1, 1))
    qkv = values.float().unsqueeze(1).expand(-1, 6).contiguous()
    qk_norm_rope_store(qkv, None, 0.0, rotation, slot_mapping, kv)


def _pages(num_blocks: int) -> Tensor:
    """Poisoned pages of one head of two elements."""
    return torch.full((num_blocks, BLOCK_SIZE, 2, 1, 2), float("nan"))


@interpreted
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_padding_writes_no_keys_and_values(kind: str) -> None:
    tables = _random_tables(torch.Generator().manual_seed(0))
    table = tables.block_tables[1]
    table[:-1] = torch.randperm(NUM_SLOTS * 12).view(NUM_SLOTS, 12).int() + 1
    kv = KVLayer.of(_pages(NUM_SLOTS * 12 + 1))
    slots = (3, NUM_SLOTS, 7, NUM_SLOTS)
    if kind == "decode":
        step = [Request(slot, None, 1, 1) for slot in slots]
        positions = [int(tables.num_computed[slot]) for slot in (3, 7)]
    else:
        counts = (1, 0, 1, 9)
        step = [Request(s, 5, n, None) for s, n in zip(slots, counts, strict=True)]
        positions = [5, 5]
    rows = _unset_rows(step, 1)
    count = sum(r.count for r in step)
    kernels.fill_rows(tables, rows)
    _store(torch.arange(count) + 1, rows.slot_mapping[1][:count], kv)
    written = {
        int(table[slot, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        for slot, position in zip((3, 7), positions, strict=True)
    }
    there = ~kv.flat.isnan().flatten(1).any(1)
    assert set(there.nonzero().flatten().tolist()) == written


def _captured(work: Callable[[], Any], pool: Any) -> Any:
    """A graph whose replay does the work again, and what the work returns now."""
    return SimpleNamespace(replay=work, pool=lambda: pool), work()


VOCAB_SIZE = 97


@interpreted
def test_captured_steps_write_to_their_requests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of chunks and decodes, of more and fewer requests than the one before, padded.

    The next token is that of the sum of all tokens up to it. Steps read them from the pages, where
    each step has stored its own.
    """
    monkeypatch.setattr("engine.graphs.captured", _captured)
    monkeypatch.setattr("engine.graphs.CHUNK_ROWS", (16,))
    staging = Staging(CPU)
    state = DeviceState(SlotTables.zeros(8, 256, BLOCK_SIZE, CPU), staging, kernels=True)
    pages = _pages(40)
    kv = KVLayer.of(pages)

    def plain_step(rows: StepRows, out: Tensor | None) -> tuple[Tensor, Tensor]:
        state.fill(rows)
        _store(rows.input_ids, rows.slot_mapping[0], kv)
        logits = torch.zeros(len(rows.sampled.rows), VOCAB_SIZE)
        known = zip(rows.sampled.slots.tolist(), rows.sampled.positions.tolist(), strict=True)
        for row, (slot, length) in enumerate(known):
            seen = state.tables.block_tables[0][slot, : -(-length // BLOCK_SIZE)].long()
            total = kv.k[seen].flatten(0, 1)[:length, 0, 0].sum()
            logits[row, int(total) % VOCAB_SIZE] = 1.0
        state.write(rows.sampled, logits.argmax(1))
        return logits if out is None else out.copy_(logits), logits

    graphs = StepGraphs(plain_step, state, max_tokens=128, weights_per_layer=1)
    graphs.capture()
    assert pages.isnan().all()
    # Block 0 belongs to nobody: padding that is stored somewhere is likely stored there.
    tokens = {slot: [slot + 1, 5, 2 * slot] for slot in range(8)}
    computed = dict.fromkeys(tokens, 0)
    blocks = {slot: list(range(4 * slot + 1, 4 * slot + 5)) for slot in range(8)}
    params = SamplingParams(temperature=0.0)
    news = tuple(NewRequest(s, s, tuple(ids), params, 0) for s, ids in tokens.items())
    updates = tuple(BlockUpdate(s, 0, tuple(ids)) for s, ids in blocks.items())
    first, rest, whole = ((0, 2, False), (2, 1, True), (0, 3, True))
    steps: list[tuple[list[tuple[int, tuple[int, int, bool]]], tuple[int, ...]]] = [
        ([(3, whole), (1, first)], ()),
        ([(1, rest), (6, whole)], (3,)),
        ([], (3, 1, 6)),
        ([], (3, 1, 6)),
        ([(s, whole) for s in (2, 4, 5, 7)], (6,)),
        ([], (5, 2, 4)),
        ([(0, first)], (2,)),
        ([], (2,)),
        ([(0, rest)], tuple(range(1, 8))),
        ([], tuple(range(8))),
        ([], (7, 0)),
    ]
    for number, (chunks, decode) in enumerate(steps):
        changes = (news, updates) if number == 0 else ((), ())
        prefill = tuple(PrefillChunk(slot, *chunk) for slot, chunk in chunks)
        plan = StepPlan(number, *changes, prefill, decode)
        state.apply(plan)
        got = graphs.replay(plan)[1].tokens.tolist()
        for chunk in prefill:
            computed[chunk.slot] += chunk.num_tokens
        for slot in decode:
            computed[slot] += 1
        for slot in plan.sampled_slots:
            tokens[slot].append(sum(tokens[slot]) % VOCAB_SIZE)
        assert got == [tokens[slot][-1] for slot in plan.sampled_slots]
        for slot, known in tokens.items():
            there = pages[blocks[slot], :, 0, 0, 0].flatten()
            assert there[: computed[slot]].tolist() == known[: computed[slot]]
            assert there[computed[slot] :].isnan().all()
        assert pages[0].isnan().all()
        assert pages[33:].isnan().all()
