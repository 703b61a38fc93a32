"""A runner that needs no model and no device, and samples wrong tokens if a KV block is wrong.

Instead of K and V the cache stores an integer for each position, the *entry*. The entry of a
position is a hash of the position's token and of a sum named `read`. `read` is the sum of the
entries of all earlier positions to which the position attends, in all cache groups. The runner
finds these entries with the block tables. The next token is a hash of the sum of all these entries
and the last token's own entry. So if a block is wrong or was freed too early, the sampled tokens
differ from the right tokens. `FakeModel.alone` computes the right tokens without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from config import Config
from engine.checking.plan_checker import CheckedHandle, PlanChecker, Row
from engine.simulated_runner import SimulatedRequest, SimulatedRunner
from engine.step import PrefillChunk, RowReport, StepPlan
from engine.types import CacheKind, FullPages, KVGeometry, StepHandle

if TYPE_CHECKING:
    from utils.checkpoint import Checkpoint

# `_POISON` is the entry of an unwritten position, `_REJECTED` the entry of a rejected draft token.
_POISON, _REJECTED = 0x7EADBEEF, 0x5EADBEEF


@dataclass(frozen=True, slots=True)
class FakeModel:
    """Computes entries and tokens with `hash`, which for integers is the same in every process."""

    vocab_size: int = 50
    eos_token_id: int = 0
    eos_chance: float = 0.0  # probability that a sampled token is `eos_token_id`
    error_chance: float = 0.0  # probability that sampling a token fails with an error
    tells: bool = False  # whether `RowReport.values` repeats the sampled tokens
    seed: int = 0  # models with different seeds sample different tokens
    kinds: tuple[CacheKind, ...] = (FullPages(),)  # to which positions each group's layers attend

    def entry(self, read: int, token: int) -> int:
        """Return a position's entry, a hash of `read` and of the position's `token`."""
        return hash((read, token))

    def sample(self, read: int, seed: int) -> int:
        """Return the next token, a hash of `read`, which here includes the last token's entry."""
        draw = hash((read, seed, self.seed))
        if (draw >> 8) % 2**20 < self.eos_chance * 2**20:
            return self.eos_token_id
        return draw % self.vocab_size

    def fails(self, read: int, seed: int) -> bool:
        """Return whether sampling the next token fails with a simulated error."""
        return hash((seed, read, self.seed)) % 2**20 < self.error_chance * 2**20

    def alone(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        stop_token_ids: Container[int] = (),
        seed: int = 0,
    ) -> list[int]:
        """Return the tokens that a request must generate, computed without a cache."""
        sums, tokens = [0], list(prompt)  # sums[i]: sum of the entries of the first i positions

        def read(position: int) -> int:
            return sum(sums[-1] - sums[kind.first_read(position)] for kind in self.kinds)

        while len(tokens) < len(prompt) + max_tokens:
            for token in tokens[len(sums) - 1 :]:
                sums.append(sums[-1] + self.entry(read(len(sums) - 1), token))
            tokens.append(self.sample(read(len(sums) - 2), seed))
            if tokens[-1] in stop_token_ids:
                break
        return tokens[len(prompt) :]


class FakeRunner(SimulatedRunner):
    """Executes plans on a cache of entries. `LLM(path, model_runner="fake")` selects this runner.

    `FakeRunner(config, groups=...)` needs no checkpoint and no torch. The runner's clock is
    simulated; by default a step takes no time. A hash decides how many draft tokens of a decode row
    are accepted. The positions of rejected drafts get the entry `_REJECTED`.
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
        eos = min(checkpoint.eos_token_ids, default=0) if checkpoint else 0
        kinds = tuple(geometry.kind for geometry in self._groups)
        self.model = model or FakeModel(self._vocab_size, eos, kinds=kinds)
        self._vocab_size = self.model.vocab_size
        self.checker = PlanChecker(self._groups, config)
        size = self.checker.block_size
        # `_pages[group][block]` lists the entries of a block. Each cache group has its own blocks.
        self._pages = [[[_POISON] * size for _ in range(g.num_blocks)] for g in self._groups]
        self._rows: dict[int, Row] = {}  # slot -> the slot's row in the current step

    def execute(self, plan: StepPlan) -> StepHandle:
        """Execute a plan. Raises a ContractError if `PlanChecker` finds an error in the plan."""
        return CheckedHandle(super().execute(plan), self.checker)

    def _start(self, plan: StepPlan) -> None:
        for group, blocks in enumerate(plan.poisoned_blocks):
            for block in blocks:
                self._poison(group, block)
        self._rows = {row.state.new.slot: row for row in self.checker.check(plan)}
        super()._start(plan)
        for copy in plan.block_copies:
            pages = self._pages[copy.group]
            pages[copy.target] = list(pages[copy.source])
        for row in self._rows.values():
            for group, place in row.fresh:
                # Keep the cached entries of a block that begins before the row's start.
                if place * self.checker.block_size >= row.start:
                    self._poison(group, row.state.tables[group][place])

    def _prefill(self, chunk: PrefillChunk) -> list[int]:
        # If the chunk samples a token, `_draw` writes the entry of the chunk's last position.
        for position in range(chunk.start, chunk.start + chunk.num_tokens - chunk.samples):
            self._compute(self._requests[chunk.slot], position)
        return super()._prefill(chunk)

    def _decode(self, slot: int, count: int) -> list[int]:
        start = len(self._requests[slot].tokens) - 1
        tokens = super()._decode(slot, count)
        end = min(start + count, self._requests[slot].new.max_total_tokens - 1)
        for position in range(start + len(tokens), end):
            self._write(slot, position, _REJECTED)
        return tokens

    def _draw(self, request: SimulatedRequest) -> int:
        """Write the entry of the request's last token, then sample and return the next token."""
        seed, end = request.new.seed, len(request.tokens)
        self._compute(request, end - 1)
        # If wrong blocks let `_compute` overwrite an entry that `_read` sums, the token is wrong.
        read = self._read(request.new.slot, end - 1, end)
        request.failed |= self.model.fails(read, seed)
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
        """Sum the entries of positions before `end` to which `position` attends, in all groups."""
        total, size, tables = 0, self.checker.block_size, self._rows[slot].state.tables
        for geometry, pages, table in zip(self._groups, self._pages, tables, strict=True):
            first = geometry.kind.first_read(position)
            read = map(pages.__getitem__, table[first // size : -(-end // size)])
            skipped = first - first % size
            total += sum(islice(chain.from_iterable(read), first - skipped, end - skipped))
        return total

    def _write(self, slot: int, position: int, entry: int) -> None:
        place, offset = divmod(position, self.checker.block_size)
        for pages, table in zip(self._pages, self._rows[slot].state.tables, strict=True):
            pages[table[place]][offset] = entry

    def _poison(self, group: int, block: int) -> None:
        self._pages[group][block] = [_POISON] * self.checker.block_size
