"""Steps a scheduler and a block manager as the engine does, and checks every move."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from config import Config
from engine.fake_runner import FakeModel, FakeRunner
from engine.sequence import Sequence
from engine.types import BlockManager, KVGeometry, Scheduler, StepHandle, StepPlan
from sampling_params import SamplingParams
from tests.contracts.audit import AuditedBlocks, require
from utils.errors import ContractError, RequestTooLongError

MakeScheduler = Callable[[Config, BlockManager], Scheduler]
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
    """

    num_blocks: int = 64
    block_size: int = 16
    max_num_seqs: int = 4
    budget: int = 64
    depth: int = 0
    eos_chance: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


class Driver:
    """The parts under test on a fake runner.

    Attributes:
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
            **s.options,
        )
        geometry = KVGeometry(1, 1, 1, s.block_size, s.num_blocks, dtype_bytes=4)
        self.model = FakeModel(eos_chance=s.eos_chance)
        self.runner = FakeRunner(config, geometry=geometry, model=self.model)
        self.blocks = AuditedBlocks(make_blocks(config, geometry))
        self.scheduler = make_scheduler(config, cast(BlockManager, self.blocks))
        self.pipeline: deque[tuple[StepPlan, StepHandle]] = deque()
        self.plans: list[StepPlan] = []
        self.seqs: list[Sequence] = []
        self._unfinished: dict[int, Sequence] = {}
        self._in_slot: dict[int, int] = {}
        self._planned: dict[int, int] = {}
        self._fruitless_steps = 0

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> Sequence:
        """Queue a request.

        Raises:
            RequestTooLongError: it can never fit, and the scheduler says so.
        """
        assert params.max_tokens is not None
        total = len(prompt) + params.max_tokens
        # The last token is only sampled, never computed.
        fits = total - 1 <= self.setting.num_blocks * self.setting.block_size
        seq = Sequence(
            len(self.seqs),
            prompt,
            params,
            max_total_tokens=total,
            stop_token_ids=stop_token_ids,
            seed=len(self.seqs),
        )
        self.blocks.salts[seq.request_id] = params.cache_salt
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
        written = self.blocks.written
        for slot, end in _rows(plan):
            request_id = self._in_slot[slot]
            self.blocks.in_flight[request_id] -= 1
            written[request_id] = written[request_id] + 1 if end is None else end
        before = self._num_tokens()
        finished = self.scheduler.commit(plan, handle.result())
        grew = self._num_tokens() > before
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
        self.blocks.check_idle()
        held = [seq for seq in self.seqs if seq.slot is not None]
        require(not held, f"{held} have ended and still hold slots")

    def check_pickles(self) -> None:
        """Every plan survives pickling and is small."""
        for plan in self.plans:
            data = pickle.dumps(plan)
            require(pickle.loads(data) == plan, f"{plan} changes when pickled")
            news = plan.new_requests
            limit = _PLAN_BYTES + _NEW_BYTES * len(news) + 8 * sum(len(n.token_ids) for n in news)
            limit += _ROW_BYTES * len([*_rows(plan), *plan.block_updates, *plan.block_copies])
            limit += 4 * sum(len(update.block_ids) for update in plan.block_updates)
            require(len(data) <= limit, f"a plan of {len(data)} bytes: {plan}")

    def check_output(self, seq: Sequence) -> None:
        """Its tokens are those it would have alone."""
        params, output = seq.sampling, seq.output_token_ids
        assert params.max_tokens is not None
        alone = self.model.alone(
            seq.token_ids[: seq.num_prompt_tokens],
            params.max_tokens,
            stop_token_ids=seq.stop_token_ids,
            seed=seq.seed,
        )
        ended = seq.finish_reason in ("stop", "length")
        if not ended:
            alone = alone[: len(output)]
        require(output == alone, f"{seq} has tokens {output}, alone it has {alone}")
        stopped = bool(alone) and alone[-1] in seq.stop_token_ids
        right = not ended or stopped == (seq.finish_reason == "stop")
        require(right, f"{seq}: a wrong reason")

    def _take_off(self, plan: StepPlan) -> None:
        flying = self.blocks.in_flight
        for new in plan.new_requests:
            seq = self._unfinished.get(new.request_id)
            require(seq is not None, f"request {new.request_id} enters a slot and has ended")
            require(not flying[new.request_id], f"{seq} enters a slot while it is in flight")
            self._in_slot[new.slot] = new.request_id
        for slot, end in _rows(plan):
            request_id = self._in_slot.get(slot, -1)
            seq = self._unfinished.get(request_id)
            if seq is None:
                raise ContractError(f"slot {slot} is planned, and its request has ended")
            flying[request_id] += 1
            planned = self._planned.get(request_id, 0) + 1 if end is None else end
            require(planned < seq.max_total_tokens, f"{seq} is planned beyond its length limit")
            self._planned[request_id] = planned

    def _end(self, seq: Sequence) -> None:
        require(
            self._unfinished.pop(seq.request_id, None) is seq, f"{seq} finishes, and is not running"
        )
        require(seq.finish_reason in ("stop", "length"), f"{seq} has finished")
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


def _rows(plan: StepPlan) -> list[tuple[int, int | None]]:
    """Slot of each row, and where its prefill chunk ends."""
    chunks = [(chunk.slot, chunk.start + chunk.num_tokens) for chunk in plan.prefill]
    return chunks + [(slot, None) for slot in plan.decode]
