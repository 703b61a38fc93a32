"""A runner without a model or a device, on which every mistake in a plan changes tokens.

Its KV cache is a real array of pages. A position's entry is a hash of its token and of all that
the block table shows of the positions it reads, and the next token is a hash of all that the table
shows up to there. A wrong block, one that was freed early, a stale prefix, a lost write: each gives
tokens other than `FakeModel.alone`, and what a plan may never ask for is a ContractError.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from config import Config
from engine.checking.plan_checker import CheckedHandle, PlanChecker, Row
from engine.simulated_runner import SimulatedRequest, SimulatedRunner
from engine.types import (
    CacheKind,
    FullPages,
    KVGeometry,
    PrefillChunk,
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
    """The pages of one cache group, as lists of entries."""

    def __init__(self, geometry: KVGeometry) -> None:
        self.kind = geometry.kind
        self._size = geometry.block_size
        self._pages = [[_POISON] * self._size for _ in range(geometry.num_blocks)]

    def poison(self, block: int) -> None:
        self._pages[block] = [_POISON] * self._size

    def copy(self, source: int, target: int) -> None:
        self._pages[target] = list(self._pages[source])

    def write(self, table: list[int], position: int, entry: int) -> None:
        self._pages[table[position // self._size]][position % self._size] = entry

    def read(self, table: list[int], start: int, end: int) -> int:
        """The sum of all that the pages hold for positions `start` to `end`."""
        first = start // self._size
        pages = map(self._pages.__getitem__, table[first : -(-end // self._size)])
        skipped = first * self._size
        return sum(islice(chain.from_iterable(pages), start - skipped, end - skipped))


class FakeRunner(SimulatedRunner):
    """Executes plans on pages of numbers: `LLM(path, model_runner="fake")`.

    It can be constructed without a checkpoint, and then without torch: `FakeRunner(config,
    groups=...)`.

    A decode row keeps as many positions as in the simulated runner; the others are left as garbage
    in the pages, as a real draft leaves them.

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
        self.model = model or _model_of(checkpoint, tuple(group.kind for group in self._groups))
        self._vocab_size = self.model.vocab_size
        limits = config.max_num_seqs, config.max_num_batched_tokens
        self.checker = PlanChecker(self._groups, *limits)
        self._pages = [_Pages(geometry) for geometry in self._groups]
        # Those of the step, by slot.
        self._rows: dict[int, Row] = {}

    def execute(self, plan: StepPlan) -> StepHandle:
        """As the contract says.

        Raises:
            ContractError: the plan asks for what no plan may; the message says what.
        """
        return CheckedHandle(super().execute(plan), self.checker)

    def _start(self, plan: StepPlan) -> None:
        for pages, blocks in zip(self._pages, plan.poisoned_blocks, strict=False):
            for block in blocks:
                pages.poison(block)
        self._rows = {row.state.new.slot: row for row in self.checker.check(plan)}
        super()._start(plan)
        for copy in plan.block_copies:
            self._pages[copy.group].copy(copy.source, copy.target)

    def _prefill(self, chunk: PrefillChunk) -> list[int]:
        self._clear_fresh(chunk.slot, chunk.start)
        # `_draw` computes the last known position.
        for position in range(chunk.start, chunk.start + chunk.num_tokens - chunk.samples):
            self._compute(self._requests[chunk.slot], position)
        return super()._prefill(chunk)

    def _decode(self, slot: int, count: int) -> list[int]:
        start = len(self._requests[slot].tokens) - 1
        self._clear_fresh(slot, start)
        tokens = super()._decode(slot, count)
        end = min(start + count, self._requests[slot].new.max_total_tokens - 1)
        for position in range(start + len(tokens), end):
            self._write(slot, position, _REJECTED)
        return tokens

    def _draw(self, request: SimulatedRequest) -> int:
        """Compute the last token's position, and sample by what the pages hold then."""
        seed, end = request.new.seed, len(request.tokens)
        self._compute(request, end - 1)
        # Not by what was written: a block may be in the table twice.
        read = self._read(request.new.slot, end - 1, end)
        request.failed = request.failed or self.model.fails(read, seed)
        return self.model.sample(read, seed)

    def _reports(self, outputs: list[list[int]]) -> dict[int, RowReport]:
        reports = {}
        for index, (slot, tokens) in enumerate(zip(self._rows, outputs, strict=True)):
            if self._requests[slot].failed:
                reports[index] = RowReport(error=ValueError("a row of the fake model"))
            elif self.model.tells:
                reports[index] = RowReport(values=tuple({"token": token} for token in tokens))
        return reports

    def _compute(self, request: SimulatedRequest, position: int) -> None:
        slot = request.new.slot
        read = self._read(slot, position, position)
        self._write(slot, position, self.model.entry(read, request.tokens[position]))

    def _read(self, slot: int, position: int, end: int) -> int:
        """What computing `position` reads of the entries before `end`, over all groups."""
        groups = zip(self._pages, self._rows[slot].state.tables, strict=True)
        return sum(
            pages.read(table, pages.kind.first_read(position), end) for pages, table in groups
        )

    def _write(self, slot: int, position: int, entry: int) -> None:
        for pages, table in zip(self._pages, self._rows[slot].state.tables, strict=True):
            pages.write(table, position, entry)

    def _clear_fresh(self, slot: int, start: int) -> None:
        """Poison blocks that came to the table for positions not computed yet."""
        row = self._rows[slot]
        for group, place in row.fresh:
            if place * self.checker.block_size >= start:
                self._pages[group].poison(row.state.tables[group][place])


def _model_of(checkpoint: Checkpoint | None, kinds: tuple[CacheKind, ...]) -> FakeModel:
    if checkpoint is None:
        return FakeModel(kinds=kinds)
    eos = min(checkpoint.eos_token_ids, default=0)
    return FakeModel(int(checkpoint.hf_config.vocab_size), eos, kinds=kinds)
