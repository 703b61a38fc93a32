"""A runner without a model or a device, on which every mistake in a plan changes tokens.

Its KV cache is a real array of pages. A position's entry is a hash of its token and of all that
the block table shows of the positions it reads, and the next token is a hash of all that the table
shows up to there. A wrong block, one that was freed early, a stale prefix, a lost write: each gives
tokens other than `FakeModel.alone`, and what a plan may never ask for is a ContractError.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

from config import Config
from engine.checking.plan_checker import CheckedHandle, PlanChecker, Row
from engine.simulated_runner import Outputs, SimulatedRunner, allowed, num_kept
from engine.types import (
    CacheKind,
    FullPages,
    KVGeometry,
    NewRequest,
    RowReport,
    StepHandle,
    StepPlan,
)

if TYPE_CHECKING:
    from utils.checkpoint import Checkpoint

# What a page holds before anything of its request was written.
_POISON = 0x7EADBEEF
# What a position that was drafted and not kept holds.
_REJECTED = 0x5EADBEEF


@dataclass(frozen=True, slots=True)
class FakeModel:
    """The arithmetic that stands for a model, the same in every process.

    The entries of a context add up to what is *read* from it: like attention, which knows order
    from the entries alone, so the sum is the same whatever the page size. Of several cache groups
    all have the same entries, and each adds those that it keeps.

    Attributes:
        eos_chance: probability that a token is `eos_token_id`, beside its share of the others.
        error_chance: probability that a row reports an error in place of a token.
        tells: every row reports its tokens as values.
        seed: another seed, another model.
        kinds: of each cache group.
    """

    vocab_size: int = 50
    eos_token_id: int = 0
    eos_chance: float = 0.0
    error_chance: float = 0.0
    tells: bool = False
    seed: int = 0
    kinds: tuple[CacheKind, ...] = (FullPages(),)

    def entry(self, read: int, token: int) -> int:
        """What the cache holds for `token` behind a context of which `read` was read."""
        # Python hashes tuples of integers alike everywhere; only str and bytes are salted.
        return hash((read, token))

    def sample(self, read: int, seed: int) -> int:
        """The token after a context, for a request with this seed."""
        draw = hash((read, seed, self.seed))
        if (draw >> 8) % 2**20 < self.eos_chance * 2**20:
            return self.eos_token_id
        return draw % self.vocab_size

    def fails(self, read: int, seed: int) -> bool:
        """Whether an error comes in place of the token after a context."""
        return hash((seed, read, self.seed)) % 2**20 < self.error_chance * 2**20

    def alone(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        stop_token_ids: Container[int] = frozenset(),
        seed: int = 0,
    ) -> list[int]:
        """The right output of a request, whatever it is batched with."""
        # Sums of the leading entries.
        sums = [0]

        def read(position: int) -> int:
            """What computing `position` reads of the entries that there are."""
            return sum(sums[-1] - sums[kind.first_read(position)] for kind in self.kinds)

        for token in prompt:
            sums.append(sums[-1] + self.entry(read(len(sums) - 1), token))
        output: list[int] = []
        while len(output) < max_tokens:
            token = self.sample(read(len(sums) - 2), seed)
            output.append(token)
            if token in stop_token_ids:
                break
            sums.append(sums[-1] + self.entry(read(len(sums) - 1), token))
        return output


class _Pages:
    """The pages of one cache group: entries, and the sum of each page."""

    def __init__(self, geometry: KVGeometry) -> None:
        self.kind = geometry.kind
        self._size = size = geometry.block_size
        self._entries = [_POISON] * (geometry.num_blocks * size)
        self._sums = [_POISON * size] * geometry.num_blocks

    def poison(self, block: int) -> None:
        size = self._size
        self._entries[block * size : (block + 1) * size] = [_POISON] * size
        self._sums[block] = _POISON * size

    def copy(self, source: int, target: int) -> None:
        size = self._size
        to, start = target * size, source * size
        self._entries[to : to + size] = self._entries[start : start + size]
        self._sums[target] = self._sums[source]

    def write(self, table: list[int], position: int, entry: int) -> None:
        block = table[position // self._size]
        place = block * self._size + position % self._size
        self._sums[block] += entry - self._entries[place]
        self._entries[place] = entry

    def read(self, table: list[int], start: int, end: int) -> int:
        """All that the pages hold for positions `start` to `end`."""
        size, entries = self._size, self._entries
        first, skipped = divmod(start, size)
        full, rest = divmod(end, size)
        total = sum(map(self._sums.__getitem__, table[first:full]))
        if rest:
            at = table[full] * size
            total += sum(entries[at : at + rest])
        if skipped:
            at = table[first] * size
            total -= sum(entries[at : at + skipped])
        return total


@dataclass(slots=True)
class _Slot:
    """A request in its slot; `num_computed` is None before its first row."""

    new: NewRequest
    tokens: list[int]
    num_computed: int | None = None
    failed: bool = False


class FakeRunner(SimulatedRunner):
    """Executes plans on pages of numbers: `LLM(path, model_runner="fake")`.

    It can be constructed without a checkpoint, and then without torch: `FakeRunner(config,
    groups=...)`.

    A decode row of several positions keeps a number of them that depends on the request's seed and
    the position; the others are left as garbage in the pages, as a real draft leaves them.

    Args:
        config: for the number of slots, the token budget and, with a checkpoint, the cache size.
        checkpoint: for vocabulary and end-of-sequence token; only its config is read.
        groups: the cache; derived from the config if None, which needs a max_model_len.
        model: another FakeModel than the checkpoint's vocabulary suggests.
        seconds: how long a step takes in virtual time.

    Attributes:
        checker: what every plan and result goes through.

    Raises:
        ConfigError: tensor_parallel_size is above 1.
    """

    name = "fake"

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint | None = None,
        *,
        groups: tuple[KVGeometry, ...] | None = None,
        model: FakeModel | None = None,
        seconds: Callable[[StepPlan], float] = lambda plan: 0.0,
    ) -> None:
        super().__init__(config, checkpoint, groups=groups, seconds=seconds)
        kinds = tuple(geometry.kind for geometry in self._groups)
        self.model = model or _model_of(checkpoint, kinds)
        self._vocab_size = self.model.vocab_size
        limits = config.max_num_seqs, config.max_num_batched_tokens
        self.checker = PlanChecker(self._groups, *limits)
        self._pages = [_Pages(geometry) for geometry in self._groups]
        self._slots: dict[int, _Slot] = {}

    def execute(self, plan: StepPlan) -> StepHandle:
        """As the contract says.

        Raises:
            ContractError: the plan asks for what no plan may; the message says what.
        """
        return CheckedHandle(super().execute(plan), self.checker.take, self.checker.fail)

    def _outputs(self, plan: StepPlan) -> Outputs:
        for pages, blocks in zip(self._pages, plan.poisoned_blocks, strict=False):
            for block in blocks:
                pages.poison(block)
        rows = self.checker.check(plan)
        for new in plan.new_requests:
            self._slots[new.slot] = _Slot(new, list(new.token_ids))
        for copy in plan.block_copies:
            self._pages[copy.group].copy(copy.source, copy.target)
        computed = [self._compute(row) for row in rows]
        tokens = [one for one, row in zip(computed, rows, strict=True) if row.samples]
        outputs = self._scored(plan, tokens, {s: slot.new for s, slot in self._slots.items()})
        for index, (row, one) in enumerate(zip(rows, computed, strict=True)):
            if self._slots[row.slot].failed:
                outputs.reports[index] = RowReport(error=ValueError("a row of the fake model"))
            elif self.model.tells:
                outputs.reports[index] = RowReport(values=tuple({"token": t} for t in one))
        return outputs

    def _compute(self, row: Row) -> list[int]:
        """Write the row's positions; the tokens sampled behind them."""
        slot = self._slots[row.slot]
        if slot.num_computed is None:
            slot.num_computed = row.start
        self._clear_fresh(row, slot.num_computed)
        reads = self._reads(row, slot.num_computed, slot.num_computed)
        if not row.decodes:
            for _ in range(row.count):
                self._write(slot, row, reads)
            return [self._sample(slot, row)] if row.samples else []
        most = min(row.count, slot.new.max_total_tokens - len(slot.tokens))
        tokens = []
        for _ in range(num_kept(slot.new.seed, slot.num_computed, most)):
            self._write(slot, row, reads)
            tokens.append(self._sample(slot, row))
        for rejected in range(slot.num_computed, slot.num_computed + most - len(tokens)):
            for pages, table in zip(self._pages, row.tables, strict=True):
                pages.write(table, rejected, _REJECTED)
        return tokens

    def _write(self, slot: _Slot, row: Row, reads: list[int]) -> None:
        """Compute the next position; `reads` becomes what the one after it reads, by group."""
        position = slot.num_computed
        assert position is not None
        entry = self.model.entry(sum(reads), slot.tokens[position])
        for group, (pages, table) in enumerate(zip(self._pages, row.tables, strict=True)):
            pages.write(table, position, entry)
            first, then = map(pages.kind.first_read, (position, position + 1))
            reads[group] += entry - (pages.read(table, first, then) if then > first else 0)
        slot.num_computed = position + 1

    def _sample(self, slot: _Slot, row: Row) -> int:
        end = slot.num_computed
        assert end is not None
        # By the pages, not by what was written to them: a block may be in the table twice.
        read = sum(self._reads(row, end - 1, end))
        slot.failed = slot.failed or self.model.fails(read, slot.new.seed)
        drawn = self.model.sample(read, slot.new.seed)
        token = allowed(drawn, self.model.vocab_size, slot.new, end)
        slot.tokens.append(token)
        return token

    def _reads(self, row: Row, position: int, end: int) -> list[int]:
        """What computing `position` reads of the entries before `end`, in each group."""
        groups = zip(self._pages, row.tables, strict=True)
        return [pages.read(table, pages.kind.first_read(position), end) for pages, table in groups]

    def _clear_fresh(self, row: Row, num_computed: int) -> None:
        """Poison blocks that came to the table for positions not computed yet."""
        for pages, table, fresh in zip(self._pages, row.tables, row.fresh, strict=True):
            for place in fresh:
                if place * self._groups[0].block_size >= num_computed:
                    pages.poison(table[place])


def _model_of(checkpoint: Checkpoint | None, kinds: tuple[CacheKind, ...]) -> FakeModel:
    if checkpoint is None:
        return FakeModel(kinds=kinds)
    eos = min(checkpoint.eos_token_ids, default=0)
    return FakeModel(int(checkpoint.hf_config.vocab_size), eos, kinds=kinds)
