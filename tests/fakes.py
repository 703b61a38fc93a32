"""A runner without a model, and what drives a scheduler by it; nothing here needs torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from config import Config
from engine.scheduler import ContinuousScheduler
from engine.sequence import Sequence
from engine.types import KVGeometry, StepPlan, StepResult
from memory.block_manager import PagedBlockManager
from sampling_params import SamplingParams

VOCAB_SIZE = 50
GREEDY = SamplingParams(temperature=0)


def _absorb(state: int, token: int) -> int:
    """The state after one more token: depends on all tokens so far and their order."""
    return hash((state, token))


def _sample(state: int) -> int:
    return state % VOCAB_SIZE


def tokens_alone(seq: Sequence) -> list[int]:
    """What `FakeModel` generates for a request that has it to itself."""
    state = 0
    for token in seq.token_ids[: seq.num_prompt_tokens]:
        state = _absorb(state, token)
    output: list[int] = []
    while seq.num_prompt_tokens + len(output) < seq.max_total_tokens:
        output.append(_sample(state))
        if output[-1] in seq.stop_token_ids:
            break
        state = _absorb(state, output[-1])
    return output


@dataclass
class _Slot:
    tokens: list[int]
    num_computed: int = 0
    table: list[int] = field(default_factory=list)


class FakeModel:
    """Executes plans on a paged cache that holds one number per position.

    A position's number is made of its token and of the number that the cache holds for the
    position before. A token that is missing, a block that two requests write, a position
    computed twice or never: each changes the tokens that follow. What a plan may not ask for
    fails an assertion.
    """

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int) -> None:
        self._block_size = block_size
        self._cache: list[int | None] = [None] * (num_blocks * block_size)
        self._slots: dict[int, _Slot] = {}
        self._max_num_seqs = max_num_seqs
        self._budget = budget
        self._next_step_id = 0

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.step_id == self._next_step_id
        self._next_step_id += 1
        rows = [chunk.slot for chunk in plan.prefill] + list(plan.decode)
        assert rows, "a plan that computes nothing"
        assert len(set(rows)) == len(rows), "a slot has two rows in one plan"
        assert len(rows) <= self._max_num_seqs
        assert plan.num_tokens <= self._budget
        for new in plan.new_requests:
            assert 0 <= new.slot < self._max_num_seqs
            self._slots[new.slot] = _Slot(list(new.token_ids))
        for update in plan.block_updates:
            table = self._slots[update.slot].table
            assert update.first_index == len(table), "an update leaves a gap or repeats blocks"
            assert update.block_ids
            table.extend(update.block_ids)
        tokens = []
        for chunk in plan.prefill:
            slot = self._slots[chunk.slot]
            assert chunk.num_tokens > 0
            assert chunk.start == slot.num_computed, "prefill does not go on where it ended"
            state = [self._compute(slot) for _ in range(chunk.num_tokens)][-1]
            assert chunk.samples == (slot.num_computed == len(slot.tokens))
            if chunk.samples:
                tokens.append(self._append(slot, state))
        for index in plan.decode:
            slot = self._slots[index]
            assert slot.num_computed == len(slot.tokens) - 1, "decode of an unfinished prefill"
            tokens.append(self._append(slot, self._compute(slot)))
        return StepResult(plan.step_id, tokens)

    def _compute(self, slot: _Slot) -> int:
        position = slot.num_computed
        before = self._cache[self._row(slot, position - 1)] if position else 0
        assert before is not None
        state = _absorb(before, slot.tokens[position])
        self._cache[self._row(slot, position)] = state
        slot.num_computed += 1
        return state

    def _row(self, slot: _Slot, position: int) -> int:
        return slot.table[position // self._block_size] * self._block_size + (
            position % self._block_size
        )

    @staticmethod
    def _append(slot: _Slot, state: int) -> list[int]:
        slot.tokens.append(_sample(state))
        return [slot.tokens[-1]]


class Bench:
    """A scheduler, its blocks and a fake model, stepped as the engine does it."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 16,
        max_num_seqs: int = 4,
        budget: int = 64,
        depth: int = 0,
    ) -> None:
        config = Config(model="none", max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        geometry = KVGeometry(1, 1, 1, block_size, num_blocks, 4)
        self.depth = depth
        self.blocks = PagedBlockManager(config, geometry)
        self.scheduler = ContinuousScheduler(config, self.blocks)
        self.model = FakeModel(num_blocks, block_size, max_num_seqs, budget)
        self.max_num_seqs = max_num_seqs
        self.pipeline: deque[tuple[StepPlan, StepResult]] = deque()
        self.plans: list[StepPlan] = []
        self.seqs: list[Sequence] = []

    def add(
        self, num_prompt: int, max_tokens: int = 8, *, stop: frozenset[int] = frozenset()
    ) -> Sequence:
        """Queue a request with a prompt of its own."""
        request_id = len(self.seqs)
        prompt = [(request_id * 7 + i * 3) % VOCAB_SIZE for i in range(num_prompt)]
        seq = Sequence(
            request_id,
            prompt,
            GREEDY,
            max_total_tokens=num_prompt + max_tokens,
            stop_token_ids=stop,
        )
        self.scheduler.add(seq)
        self.seqs.append(seq)
        return seq

    def launch(self) -> StepPlan | None:
        """Plan a step and start it."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            self.pipeline.append((plan, self.model.execute(plan)))
        return plan

    def land(self) -> list[Sequence]:
        """Commit the oldest step."""
        plan, result = self.pipeline.popleft()
        return self.scheduler.commit(plan, result)

    def step(self) -> list[Sequence]:
        """One round of the engine's loop; the requests that finished."""
        while len(self.pipeline) <= self.depth and self.launch() is not None:
            pass
        if not self.pipeline:
            assert not self.scheduler.has_unfinished, "nothing planned, nothing in flight"
            return []
        return self.land()

    def run(self, until: Callable[[], bool] | None = None) -> list[Sequence]:
        """Step to the end, or until a condition holds; the finished, in order."""
        finished: list[Sequence] = []
        while self.pipeline or self.scheduler.has_unfinished:
            if until is not None and until():
                return finished
            finished += self.step()
        assert until is None, "the condition never held"
        return finished

    def drain(self) -> None:
        """Commit all that is in flight."""
        while self.pipeline:
            self.land()

    def assert_clean(self) -> None:
        """Every slot and block came back."""
        assert not self.scheduler.has_unfinished
        assert self.blocks.num_free_blocks == self.blocks.num_blocks
        ledger = self.scheduler._ledger
        assert ledger.num_in_flight == 0
        assert sorted(ledger._free_slots) == list(range(self.max_num_seqs))
        assert all(seq.slot is None for seq in self.seqs)

    def assert_outputs(self) -> None:
        """Every finished request has the tokens it would have alone."""
        for seq in self.seqs:
            alone = tokens_alone(seq)
            if seq.finish_reason in ("stop", "length"):
                assert seq.output_token_ids == alone
            else:
                assert seq.output_token_ids == alone[: len(seq.output_token_ids)]
