"""Steps a scheduler and a block manager as the engine does, and checks every move."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from config import Config
from engine.checking.fake_runner import FakeModel, FakeRunner
from engine.requests import Sequence
from engine.types import (
    BlockManager,
    Clock,
    KVGeometry,
    Scheduler,
    StepHandle,
    StepPlan,
    WindowPages,
)
from memory.block_manager import PagedBlockManager
from memory.cache_groups import CachingWindowManager, WindowBlockManager, grouped
from sampling_params import SamplingParams
from tests.contracts.audit import AuditedBlocks, require
from utils.errors import ContractError, RequestTooLongError

MakeScheduler = Callable[[Config, BlockManager, Clock], Scheduler]
MakeBlocks = Callable[[Config, KVGeometry], BlockManager]

# Bytes of a pickled plan: class names and such; each row, new block and new token at most.
_PLAN_BYTES, _ROW_BYTES, _NEW_BYTES = 1024, 40, 400


@dataclass(frozen=True)
class Setting:
    """The world in which the parts run.

    Attributes:
        budget: max_num_batched_tokens.
        depth: plans in flight besides the one that is waited for.
        options: further options of `Config`.
        window: of a second cache group, if it is not 0: the layers that see so many positions.
        window_blocks: of that group.
        error_chance: probability that a row reports an error in place of a token.
        tells: rows report their tokens as values.
    """

    num_blocks: int = 64
    block_size: int = 16
    max_num_seqs: int = 4
    budget: int = 64
    depth: int = 0
    eos_chance: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    window: int = 0
    window_blocks: int = 64
    error_chance: float = 0.0
    tells: bool = True

    @property
    def groups(self) -> tuple[KVGeometry, ...]:
        """The cache groups."""
        size = self.block_size
        full = KVGeometry(1, 1, 1, size, self.num_blocks, dtype_bytes=4)
        if not self.window:
            return (full,)
        kind = WindowPages(self.window)
        return full, KVGeometry(1, 1, 1, size, self.window_blocks, dtype_bytes=4, kind=kind)


class Driver:
    """The parts under test on a fake runner.

    With two cache groups the block manager under test makes way for those without prefix caching,
    unless it can cache prefixes with several groups.

    Attributes:
        blocks: the first cache group's manager, under audit.
        audits: those of all groups.
        seqs: all requests that were taken in, by request_id.
        plans: every plan, in order.
    """

    def __init__(
        self, setting: Setting, make_scheduler: MakeScheduler, make_blocks: MakeBlocks
    ) -> None:
        s = self.setting = setting
        config = Config(
            model="none",
            max_num_seqs=s.max_num_seqs,
            max_num_batched_tokens=s.budget,
            **{"pipeline_depth": s.depth, **s.options},
        )
        kinds = tuple(geometry.kind for geometry in s.groups)
        self.model = FakeModel(
            eos_chance=s.eos_chance, error_chance=s.error_chance, tells=s.tells, kinds=kinds
        )
        self.runner = FakeRunner(config, groups=s.groups, model=self.model)
        makes: tuple[MakeBlocks, ...] = (make_blocks,)
        if s.window:
            caches = getattr(make_blocks, "caches_prefixes", False)
            able = caches and hasattr(make_blocks, "cached_tokens")
            full = make_blocks if able else PagedBlockManager
            makes = (full, CachingWindowManager if able else WindowBlockManager)
        self.audits = [
            AuditedBlocks(make(config, geometry), geometry.kind)
            for make, geometry in zip(makes, s.groups, strict=True)
        ]
        self.blocks = self.audits[0]
        managers = cast(tuple[BlockManager, ...], tuple(self.audits))
        self.scheduler = make_scheduler(config, grouped(managers), self.runner.now)
        self.pipeline: deque[tuple[StepPlan, StepHandle]] = deque()
        self.plans: list[StepPlan] = []
        self.seqs: list[Sequence] = []
        self._unfinished: dict[int, Sequence] = {}
        self._in_slot: dict[int, int] = {}
        self._fruitless_steps = 0

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        stop_token_ids: frozenset[int] = frozenset(),
        prompt_only: bool = False,
    ) -> Sequence:
        """Queue a request.

        Args:
            prompt_only: it may not get any token, and ends when its prompt is computed.

        Raises:
            RequestTooLongError: it can never fit, and the scheduler says so.
        """
        assert params.max_tokens is not None
        total = len(prompt) + (0 if prompt_only else params.max_tokens)
        # The last token is only sampled, never computed.
        num_computed, size = max(len(prompt), total - 1), self.setting.block_size
        needed = [-(-num_computed // size)]
        if window := self.setting.window:
            # The positions of one window, wherever they begin in a block.
            needed.append(min(*needed, (min(window, num_computed) + size - 2) // size + 1))
        there = [geometry.num_blocks for geometry in self.setting.groups]
        fits = all(count <= most for count, most in zip(needed, there, strict=True))
        seq = Sequence(
            len(self.seqs),
            prompt,
            params,
            max_total_tokens=total,
            stop_token_ids=stop_token_ids,
            seed=len(self.seqs),
        )
        for audit in self.audits:
            audit.salts[seq.request_id] = seq.cache_salt
        try:
            self.scheduler.add(seq)
        except RequestTooLongError:
            require(not fits, f"{seq} was refused although the cache can hold it")
            raise
        require(fits, f"{seq} was not refused although it can never fit the cache")
        self.seqs.append(seq)
        self._unfinished[seq.request_id] = seq
        return seq

    def abort(self, request_id: int) -> Sequence | None:
        """Abort a request, whatever it is doing; None if it is unknown or has ended."""
        expected = self._unfinished.pop(request_id, None)
        aborted = self.scheduler.abort(request_id)
        require(aborted is expected, f"abort({request_id}) returned {aborted}, not {expected}")
        if aborted is not None:
            require(aborted.finish_reason == "abort", f"{aborted} was aborted")
            self.runner.checker.end(request_id)
            self.check_output(aborted)
        return aborted

    def launch(self) -> StepPlan | None:
        """Plan a step and start it."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            self._take_off(plan)
            self.pipeline.append((plan, self.runner.execute(plan)))
        return plan

    def land(self) -> list[Sequence]:
        """Commit the oldest step; the requests that finished with it."""
        plan, handle = self.pipeline.popleft()
        result = handle.result()
        failed = {row for row, report in result.reports.items() if report.error is not None}
        tokens = iter(result.tokens)
        chunks = [(chunk.num_tokens, chunk.samples) for chunk in plan.prefill]
        for row, slot in enumerate(plan.row_slots):
            num_computed, samples = chunks[row] if row < len(chunks) else (0, True)
            num_tokens = len(next(tokens)) if samples else 0
            for audit in self.audits:
                audit.in_flight[self._in_slot[slot]] -= 1
                if row not in failed:
                    # As far as the positions were kept.
                    audit.written[self._in_slot[slot]] += num_computed or num_tokens
        before = self._num_tokens()
        finished = self.scheduler.commit(plan, result)
        grew = bool(finished) or self._num_tokens() > before
        for seq in finished:
            self._end(seq)
        self._check_progress(grew)
        return finished

    def step(self) -> list[Sequence]:
        """One round of the engine's loop; the requests that finished."""
        while len(self.pipeline) <= self.setting.depth and self.launch() is not None:
            pass
        if self.pipeline:
            return self.land()
        require(not self._unfinished, f"nothing is planned for {[*self._unfinished.values()]}")
        return []

    def run(self, until: Callable[[], bool] | None = None) -> list[Sequence]:
        """Step to the end, or until a condition holds; the finished, in order."""
        finished: list[Sequence] = []
        while self.pipeline or self._unfinished:
            if until is not None and until():
                return finished
            finished += self.step()
        assert until is None, "the condition never held"
        return finished

    def finish(self) -> None:
        """Step to the end; nothing may be left over."""
        self.run()
        self.check_idle()

    def check_idle(self) -> None:
        """All requests have ended, and every slot and block came back."""
        require(not self.pipeline and not self._unfinished, "requests are unfinished")
        require(not self.scheduler.has_unfinished, "has_unfinished is true when all have ended")
        require(self.scheduler.schedule() is None, "a plan without a request")
        for audit in self.audits:
            audit.check_idle()
        held = [seq for seq in self.seqs if seq.slot is not None]
        require(not held, f"{held} have ended and still hold slots")

    def check_pickles(self) -> None:
        """Every plan survives pickling and is small."""
        for plan in self.plans:
            data = pickle.dumps(plan)
            require(pickle.loads(data) == plan, f"{plan} changes when pickled")
            news = plan.new_requests
            limit = _PLAN_BYTES + _NEW_BYTES * len(news) + 8 * sum(len(n.token_ids) for n in news)
            limit += _ROW_BYTES * len([*plan.row_slots, *plan.block_updates, *plan.block_copies])
            limit += 4 * sum(len(update.block_ids) for update in plan.block_updates)
            require(len(data) <= limit, f"a plan of {len(data)} bytes: {plan}")

    def check_output(self, seq: Sequence) -> None:
        """Its tokens are those it would have alone."""
        params, output = seq.sampling, seq.output_token_ids
        alone = self.model.alone(
            seq.token_ids[: seq.num_prompt_tokens],
            seq.max_total_tokens - seq.num_prompt_tokens,
            stop_token_ids=seq.stop_token_ids,
            seed=seq.seed,
        )
        ended = seq.finish_reason in ("stop", "length")
        if not ended:
            alone = alone[: len(output)]
        require(output == alone, f"{seq} has tokens {output}, alone it has {alone}")
        scored = output if params.logprobs is not None else []
        leads = [next(iter(scores)) for scores in seq.logprobs]
        require(leads == scored, f"{seq} has log-probabilities {seq.logprobs}")
        told = [{"token": token} for token in output if self.setting.tells]
        require(seq.values == told, f"{seq} has values {seq.values}, and tokens {output}")
        require(len(seq.token_times) == len(output), f"{seq} has {len(seq.token_times)} times")
        stopped = bool(alone) and alone[-1] in seq.stop_token_ids
        right = not ended or stopped == (seq.finish_reason == "stop")
        require(right, f"{seq}: a wrong reason")

    def _take_off(self, plan: StepPlan) -> None:
        for new in plan.new_requests:
            seq = self._unfinished.get(new.request_id)
            if seq is None:
                raise ContractError(f"request {new.request_id} enters a slot and has ended")
            told = (new.token_ids, new.max_total_tokens, new.seed)
            known = (tuple(seq.token_ids), seq.max_total_tokens, seq.seed)
            require(told == known, f"{new} says {told} of {seq}, which has {known}")
            self._in_slot[new.slot] = new.request_id
        for slot in plan.row_slots:
            for audit in self.audits:
                audit.in_flight[self._in_slot.get(slot, -1)] += 1

    def _end(self, seq: Sequence) -> None:
        require(
            self._unfinished.pop(seq.request_id, None) is seq, f"{seq} finishes, and is not running"
        )
        failed = seq.finish_reason == "error" and seq.error is not None
        require(failed or seq.finish_reason in ("stop", "length"), f"{seq} has finished")
        self.runner.checker.end(seq.request_id)
        self.check_output(seq)

    def _check_progress(self, grew: bool) -> None:
        """Without new tokens, prefills and recomputations must come to an end."""
        unfinished = self._unfinished.values()
        require(
            self.scheduler.has_unfinished or not unfinished, "has_unfinished is false too early"
        )
        self._fruitless_steps = 0 if grew else self._fruitless_steps + 1
        if self._fruitless_steps > 16:
            patience = 16 + 2 * sum(len(seq.token_ids) for seq in unfinished)
            if self._fruitless_steps > patience:
                raise ContractError(f"{self._fruitless_steps} steps without a token: a livelock")

    def _num_tokens(self) -> int:
        return sum([len(seq.token_ids) for seq in self._unfinished.values()])
