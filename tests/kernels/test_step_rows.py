"""The kernels between per-slot tables and a step's rows, on a CPU through Triton's interpreter.

Collected normally, this file offers one test that starts the others in a process of their own.
Outputs are poisoned before a kernel runs, and so is the tables' last row, which is padding: a
kernel may neither read it nor write to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from engine.batch import SlotTables
from engine.decode_step import DecodeStep
from torch import Tensor

from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepPlan
from layers.parallel import ParallelContext
from layers.sampler import Sampler
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

if INTERPRET and HAS_TRITON:
    from layers.kernels.slots import (
        DecodeRows,
        StepRows,
        enter_requests,
        gather_decode,
        gather_decode_reference,
        gather_rows,
        scatter_tokens,
        scatter_tokens_reference,
    )

    from layers.kernels import slots as slot_kernels
    from layers.kernels.qkv import qk_norm_rope_store

    patch_interpreter()

CPU = torch.device("cpu")
BLOCK_SIZE, WIDTH, NUM_SLOTS = 8, 96, 40
POISON = -7
# A read at this position would leave the tables, and the process.
FAR = 1 << 40


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


@dataclass
class Tables:
    """Per-slot tables as `SlotTables` has them; the last row is padding."""

    tokens: Tensor
    block_tables: Tensor
    num_computed: Tensor
    temperatures: Tensor
    seeds: Tensor

    @staticmethod
    def random(generator: torch.Generator) -> Tables:
        """Block ids are so large that most rows of the cache are beyond 2^31."""

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        rows = NUM_SLOTS + 1
        made = Tables(
            tokens=integers(0, 150_000, rows, WIDTH).int(),
            block_tables=integers(0, 2**31 - 1, rows, WIDTH // BLOCK_SIZE).int(),
            num_computed=integers(0, WIDTH - 1, rows),
            temperatures=torch.rand(rows, generator=generator),
            seeds=integers(0, 2**63 - 1, rows),
        )
        made.tokens[-1], made.block_tables[-1], made.num_computed[-1] = POISON, POISON, FAR
        made.temperatures[-1], made.seeds[-1] = float("nan"), POISON
        return made

    def copy(self) -> Tables:
        return Tables(*(getattr(self, f.name).clone() for f in fields(self)))

    def assert_equal(self, other: Tables) -> None:
        for f in fields(self):
            ours, theirs = getattr(self, f.name), getattr(other, f.name)
            assert torch.equal(ours[:-1], theirs[:-1]), f.name
            torch.testing.assert_close(ours[-1], theirs[-1], rtol=0, atol=0, equal_nan=True)


def _poisoned(rows: Any) -> Any:
    for name in rows.__slots__:
        getattr(rows, name).fill_(POISON)
    return rows


def _some_slots(size: int, generator: torch.Generator) -> Tensor:
    """[size] different slots, three in ten of them replaced by padding."""
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:size]
    slots[torch.rand(size, generator=generator) < 0.3] = NUM_SLOTS
    return slots


def _assert_rows(got: Any, expected: Any, size: int) -> None:
    """The first rows of each column are the expected ones, and the others as they were."""
    for name in got.__slots__:
        column = getattr(got, name)
        assert column[:size].tolist() == getattr(expected, name)[:size].tolist(), name
        assert (column[size:] == POISON).all(), name


# One row, a program's 32 but for one, all of them, and more.
SIZES = [1, 31, 32, 33, 40]


@interpreted
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", _seeds(3))
def test_gather_decode(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables, slots = Tables.random(generator), _some_slots(size, generator)
    before = tables.copy()
    out = _poisoned(DecodeRows.empty(size + 3, CPU))
    arguments = [getattr(tables, f.name) for f in fields(tables)]
    gather_decode(slots, *arguments, block_size=BLOCK_SIZE, out=out.first(size))
    tables.assert_equal(before)
    expected = DecodeRows.empty(size, CPU)
    # It reads the padding row, at position 0.
    gather_decode_reference(slots, *arguments, block_size=BLOCK_SIZE, out=expected)
    _assert_rows(out, expected, size)
    padding = out.slots[:size] == NUM_SLOTS
    assert (out.slot_mapping[:size][padding] == -1).all()
    assert (out.context_lens[:size][padding] == 0).all()


@interpreted
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", _seeds(3))
def test_scatter_tokens(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables, slots = Tables.random(generator), _some_slots(size, generator)
    rows = _poisoned(DecodeRows.empty(size + 3, CPU))
    rows.slots[:size] = slots.int()
    rows.positions[:size] = torch.where(slots == NUM_SLOTS, FAR, tables.num_computed[slots])
    sampled = torch.randint(0, 2**31, (size,), generator=generator)
    expected = tables.copy()
    scatter_tokens(sampled, rows.first(size), tables.tokens, tables.num_computed)
    scatter_tokens_reference(sampled, rows.first(size), expected.tokens, expected.num_computed)
    tables.assert_equal(expected)


@pytest.fixture
def _few_tokens_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that requests of some tens of tokens take several programs, as those of 1,024 do."""
    if INTERPRET:
        monkeypatch.setattr(slot_kernels, "_TOKENS", 16)


@interpreted
@pytest.mark.usefixtures("_few_tokens_a_program")
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("seed", _seeds(3))
def test_enter_requests(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = Tables.random(generator)
    expected = tables.copy()
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:count]
    lengths = torch.randint(1, WIDTH, (count,), generator=generator)
    # The edges of a program's share, and the longest there can be.
    lengths[: min(count, 4)] = torch.tensor([WIDTH, 16, 17, 1])[:count]
    firsts = lengths.cumsum(0) - lengths
    seeds = torch.randint(0, 2**63 - 1, (count,), generator=generator)
    temperatures = torch.rand(count, generator=generator)
    ids = torch.randint(0, 150_000, (int(lengths.sum()),), generator=generator).int()
    enter_requests(
        torch.stack((slots, firsts, lengths, seeds)),
        temperatures,
        ids,
        longest=int(lengths.max()),
        tokens=tables.tokens,
        out_temperatures=tables.temperatures,
        out_seeds=tables.seeds,
    )
    for i, slot in enumerate(slots.tolist()):
        expected.tokens[slot, : lengths[i]] = ids[firsts[i] : firsts[i] + lengths[i]]
        expected.temperatures[slot], expected.seeds[slot] = temperatures[i], seeds[i]
    tables.assert_equal(expected)


@dataclass(frozen=True)
class Row:
    """A request's part of a step.

    Attributes:
        start: first position; None for the next one of a decode.
        samples: None where it has no place among the sampled ones.
    """

    slot: int
    start: int | None
    count: int
    samples: bool | None


def _random_step(generator: torch.Generator) -> list[Row]:
    """Chunks with and without a sample, decodes, and padding of both kinds."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    slots = torch.randperm(NUM_SLOTS, generator=generator).tolist()
    rows = []
    for i, count in enumerate((1, 16, 17, 60, integer(1, 90))):
        samples = (True, False, None)[integer(0, 2)]
        rows.append(Row(slots[i], integer(0, WIDTH - count), count, samples))
    rows += [Row(slot, None, 1, True) for slot in slots[5 : 5 + integer(0, 9)]]
    # As of a captured prefill with fewer requests than it was made for.
    rows += [Row(NUM_SLOTS, 0, 0, False), Row(NUM_SLOTS, 0, integer(1, 40), None)]
    return rows


@interpreted
@pytest.mark.usefixtures("_few_tokens_a_program")
@pytest.mark.parametrize("seed", _seeds(6))
def test_gather_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables, step = Tables.random(generator), _random_step(generator)
    header, first, place = torch.empty(6, len(step), dtype=torch.int64), 0, 0
    wanted: dict[str, list[Any]] = {name: [] for name in StepRows.__slots__}
    after = tables.copy()
    wanted["query_start"].append(0)
    for i, row in enumerate(step):
        padding = row.slot == NUM_SLOTS
        start = int(tables.num_computed[row.slot]) if row.start is None else row.start
        at = range(start, start + row.count)
        block = [int(tables.block_tables[row.slot, p // BLOCK_SIZE]) for p in at]
        mapping = [b * BLOCK_SIZE + p % BLOCK_SIZE for b, p in zip(block, at, strict=True)]
        nothing = [0] * row.count
        wanted["input_ids"] += nothing if padding else tables.tokens[row.slot, at].tolist()
        wanted["positions"] += nothing if padding else at
        wanted["slot_mapping"] += [-1] * row.count if padding else mapping
        wanted["slots"].append(row.slot)
        wanted["context_lens"].append(0 if padding else at.stop)
        if not padding:
            after.num_computed[row.slot] = at.stop
        header[:4, i] = torch.tensor(
            [row.slot, -1 if row.start is None else start, row.count, first]
        )
        header[4:, i] = torch.tensor([-1 if row.samples is None else place, bool(row.samples)])
        first += row.count
        wanted["query_start"].append(first)
        if row.samples is not None:
            sampled = (first - 1, row.slot, at.stop) if row.samples else (0, NUM_SLOTS, 0)
            for name, value in zip(StepRows.__slots__[-3:], sampled, strict=True):
                wanted[name].append(value)
            place += 1
    out = _poisoned(StepRows.empty(first + 5, len(step) + 2, place + 2, CPU))
    gather_rows(
        header,
        tables.tokens,
        tables.block_tables,
        tables.num_computed,
        block_size=BLOCK_SIZE,
        longest=max(row.count for row in step),
        out=out,
    )
    for name, values in wanted.items():
        column = getattr(out, name).tolist()
        assert column == values + [POISON] * (len(column) - len(values)), name
    tables.assert_equal(after)


def _store(values: Tensor, slot_mapping: Tensor, kv: KVLayer) -> None:
    """Write [T] values as K and V of their positions, by the kernel that the models use."""
    ones, zeros = torch.ones(1, 1), torch.zeros(1, 1)
    qkv = values.float().unsqueeze(1).expand(-1, 6).contiguous()
    positions = torch.zeros_like(slot_mapping)
    qk_norm_rope_store(qkv, None, None, 0.0, ones, zeros, positions, slot_mapping, kv.k, kv.v)


def _pages(num_blocks: int) -> Tensor:
    """Poisoned pages of one head of two elements."""
    return torch.full((num_blocks, BLOCK_SIZE, 2, 1, 2), float("nan"))


@interpreted
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_padding_writes_no_keys_and_values(kind: str) -> None:
    tables = Tables.random(torch.Generator().manual_seed(0))
    tables.block_tables[:-1] = torch.randperm(NUM_SLOTS * 12).view(NUM_SLOTS, 12).int() + 1
    pages = _pages(NUM_SLOTS * 12 + 1)
    kv = KVLayer.of(pages)
    slots = torch.tensor([3, NUM_SLOTS, 7, NUM_SLOTS])
    out: DecodeRows | StepRows
    if kind == "decode":
        out = rows = DecodeRows.empty(4, CPU)
        arguments = [getattr(tables, f.name) for f in fields(tables)]
        gather_decode(slots, *arguments, block_size=BLOCK_SIZE, out=rows)
        positions = [int(tables.num_computed[slot]) for slot in (3, 7)]
    else:
        out = step = StepRows.empty(11, 4, 4, CPU)
        counts = torch.tensor([1, 0, 1, 9])
        zeros = torch.zeros(4, dtype=torch.int64)
        first = torch.tensor([0, 1, 1, 2])
        header = torch.stack((slots, zeros + 5, counts, first, zeros - 1, zeros))
        header[1, 3] = 0
        names = (tables.tokens, tables.block_tables, tables.num_computed)
        gather_rows(header, *names, block_size=BLOCK_SIZE, longest=9, out=step)
        positions = [5, 5]
    _store(torch.arange(len(out.input_ids)) + 1, out.slot_mapping, kv)
    written = {
        int(tables.block_tables[slot, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        for slot, position in zip((3, 7), positions, strict=True)
    }
    there = ~kv.flat.isnan().flatten(1).any(1)
    assert set(there.nonzero().flatten().tolist()) == written


class _Summing:
    """Stands in for model and backend: the next token is that of the sum of all visible tokens.

    It reads them as K and V from the pages, where each step has stored its own.
    """

    vocab_size = 97

    def __init__(self) -> None:
        self.rotary = self

    def prepare(self, about: Any) -> Any:
        return about

    def __call__(self, batch: Any) -> Tensor:
        (kv,) = batch.kv
        _store(batch.input_ids, batch.slot_mapping, kv)
        about = batch.attention
        logits = torch.zeros(len(about.slots), self.vocab_size)
        for row, (slot, length) in enumerate(
            zip(about.slots.tolist(), about.context_lens.tolist(), strict=True)
        ):
            seen = about.block_tables[slot, : -(-length // BLOCK_SIZE)].long()
            total = kv.k[seen].flatten(0, 1)[:length, 0, 0].sum() if length else torch.tensor(0)
            logits[row, int(total) % self.vocab_size] = 1.0
        return logits


class _Eager:
    """Stands in for `DecodeGraphs`: a replay calls the step again, on the same slots."""

    pool = None

    def __init__(self, step: Callable[[Tensor], Tensor], slots: Tensor, sizes: list[int]) -> None:
        self._step, self._slots, self._sizes = step, slots, sizes

    def padded(self, size: int) -> int:
        return next(s for s in self._sizes if s >= size)

    def replay(self, size: int) -> Tensor:
        return self._step(self._slots[:size])


@interpreted
def test_a_padded_decode_step_writes_to_its_requests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of fewer and of more requests than the one before, padded and not."""
    monkeypatch.setattr("engine.decode_step.DecodeGraphs", _Eager)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tables = SlotTables(8, WIDTH, BLOCK_SIZE, CPU)
    pages = _pages(40)
    model: Any = _Summing()
    sampler = Sampler(ParallelContext(), CPU, torch.float32)
    step = DecodeStep(model, model, sampler, tables, [KVLayer.of(pages)], BLOCK_SIZE)
    step.capture([1, 4, 8])
    assert pages.isnan().all()
    # Block 0 belongs to nobody: padding that is stored somewhere is likely stored there.
    tokens = {slot: [slot + 1, 5, 2 * slot] for slot in range(8)}
    blocks = {slot: list(range(4 * slot + 1, 4 * slot + 5)) for slot in range(8)}
    params = SamplingParams(temperature=0.0)
    news = tuple(NewRequest(s, s, tuple(ids), params, 0) for s, ids in tokens.items())
    updates = tuple(BlockUpdate(s, 0, tuple(ids)) for s, ids in blocks.items())
    chunks = tuple(PrefillChunk(s, 0, 2, False) for s in range(8))
    inputs = tables.stage(StepPlan(0, news, updates, chunks))
    _store(inputs.input_ids, inputs.slot_mapping, KVLayer.of(pages))
    everyone = tuple(range(8))
    steps = ((3, 1, 6), (3, 1, 6), (5, 2, 4), (2,), everyone, (7, 0))
    for number, decode in enumerate(steps):
        got = step.run(StepPlan(number + 1, decode=decode))
        assert len(got) == len(decode)
        for slot in decode:
            tokens[slot].append(sum(tokens[slot]) % model.vocab_size)
        assert got.tolist() == [tokens[slot][-1] for slot in decode]
        for slot, known in tokens.items():
            # All but the last token, which the next step computes.
            there = pages[blocks[slot], :, 0, 0, 0].flatten()
            assert there[: len(known) - 1].tolist() == known[:-1]
            assert there[len(known) - 1 :].isnan().all()
        assert pages[0].isnan().all()
        assert pages[33:].isnan().all()
