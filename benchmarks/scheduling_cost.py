"""What a step costs on the CPU beside the model: planning and texts, with no model at all."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.scheduling_growth import measure_growth
from config import Config
from engine.parts import PART_KINDS
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from engine.types import KVGeometry, StepResult
from llm import LLM
from memory.block_manager import PrefixCacheManager
from sampling_params import SamplingParams

NUM_RUNNING = 256
NUM_WAITING = (1_000, 10_000, 100_000)
NUM_WAITING_TEXTS = (0, 20_000)
_VOCAB_SIZE = 151_936
_NUM_USERS = 1_000
MODEL = Path(__file__).parents[1] / "assets" / "qwen3-tiny-python"  # for its tokenizer


@dataclass(frozen=True)
class Cost:
    """Wall seconds of each step with a queue policy and so many requests waiting.

    For what `benchmarks.scheduling_growth` measures, `policy` says what that is, and `num_waiting`
    how many there were of what the cost may grow with.
    In place of a policy, the costs of texts have the kind of the requests.
    """

    policy: str
    num_waiting: int
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Load:
    """A scheduler with 256 running requests, one of which ends in most steps.

    Requests are alike in length, so that a policy which prefers short ones finds as much work
    in a long queue as in a short one.

    Args:
        policy: name of a queue policy.
        num_waiting: requests that are kept waiting.
    """

    def __init__(self, policy: str, num_waiting: int) -> None:
        self.policy, self.num_waiting = policy, num_waiting
        self.seconds: list[float] = []
        config = Config(model="none", max_num_seqs=NUM_RUNNING, queue_policy=policy)
        geometry = KVGeometry(1, 1, 1, config.kvcache_block_size, 4 * NUM_RUNNING, 2)
        blocks = PrefixCacheManager(config, geometry)
        self.scheduler = ContinuousScheduler(config, blocks, time.perf_counter)
        self._rng = random.Random(0)
        self._num_requests = 0
        self.waiting: set[int] = set()
        self._ids: list[int] = []
        # The first ones have 1 to 256 tokens to go, so that they do not end together.
        first = [self.request(1 + i) for i in range(NUM_RUNNING)]
        self._step([], first)
        self._step([], [self.request() for _ in range(num_waiting)])
        self.seconds.clear()

    def step(self) -> None:
        """One step: an abort, arrivals in place of those who left the queue, schedule, commit."""
        aborts = [self._some_waiting()] if self.num_waiting else []
        missing = self.num_waiting - len(self.waiting) if self.num_waiting else self._num_free()
        self._step(aborts, [self.request() for _ in range(missing)])

    def _step(self, aborts: list[int], arrivals: list[Sequence]) -> None:
        begin = time.perf_counter()
        for request_id in aborts:
            self.scheduler.abort(request_id)
        for seq in arrivals:
            self.scheduler.add(seq)
        plan = self.scheduler.schedule()
        planned = time.perf_counter()
        assert plan is not None
        result = StepResult(plan.step_id, [[7] for _ in plan.sampled_slots], planned)
        executed = time.perf_counter()
        self.scheduler.commit(plan, result)
        self.seconds.append(time.perf_counter() - executed + planned - begin)
        self.waiting.update(seq.request_id for seq in arrivals)
        self.waiting.difference_update(new.request_id for new in plan.new_requests)
        self._ids += [seq.request_id for seq in arrivals]

    def _num_free(self) -> int:
        return NUM_RUNNING - self.scheduler.batch.num_running

    def _some_waiting(self) -> int:
        while True:
            place = self._rng.randrange(len(self._ids))
            request_id = self._ids[place]
            self._ids[place] = self._ids[-1]
            self._ids.pop()
            if request_id in self.waiting:
                self.waiting.remove(request_id)
                return request_id

    def request(self, num_output: int | None = None) -> Sequence:
        rng, request_id = self._rng, self._num_requests
        self._num_requests += 1
        prompt = [rng.randrange(_VOCAB_SIZE) for _ in range(rng.randint(48, 64))]
        num_output = num_output or rng.randint(250, 256)
        user, priority = str(rng.randrange(_NUM_USERS)), rng.randrange(10)
        params = SamplingParams(max_tokens=num_output, user=user, priority=priority)
        return Sequence(
            request_id,
            prompt,
            params,
            max_total_tokens=len(prompt) + num_output,
            stop_token_ids=frozenset({0}),
        )


@dataclass(frozen=True)
class Texts:
    """A kind of requests: whether they are streamed, and how many stop strings they have."""

    name: str
    stream: bool = False
    num_stops: int = 0

    def stops(self) -> tuple[str, ...]:
        """Stop strings that begin like the text, and that no output has."""
        rng = random.Random(0)
        letters = "aeinorst"
        return tuple("".join(rng.choices(letters, k=12)) + "\x7f" for _ in range(self.num_stops))


KINDS = (
    Texts("tokens alone"),
    Texts("streams", stream=True),
    Texts("streams with 2 stop strings", stream=True, num_stops=2),
    Texts("streams with 1,000 stop strings", stream=True, num_stops=1_000),
)


class TextLoad:
    """`LLM.step` on a simulated runner, with 256 running requests, and as many waiting as asked.

    A step costs what the engine, the scheduler and the simulated runner need, and what the texts
    need. The queue keeps its length: requests are added between the steps.
    """

    def __init__(
        self, kind: Texts, num_waiting: int, model: Path = MODEL, num_running: int = NUM_RUNNING
    ) -> None:
        self.kind, self.num_waiting = kind, num_waiting
        self.seconds: list[float] = []
        options = {"max_num_seqs": num_running, "num_kvcache_blocks": 4 * num_running}
        self.llm = LLM(model, model_runner="simulated", pipeline_depth=0, **options)
        self._params = SamplingParams(
            max_tokens=256, stop=kind.stops(), seed=0, ignore_eos=True, temperature=0
        )
        self._rng = random.Random(0)
        # The first ones have 1 to 256 tokens to go, so that they do not end together.
        for i in range(num_running):
            self._add(1 + i * 256 // num_running)
        self.llm.step()
        self._fill()

    def step(self) -> None:
        begin = time.perf_counter()
        self.llm.step()
        self.seconds.append(time.perf_counter() - begin)
        self._fill()

    def _fill(self) -> None:
        """Add requests until all slots are used and as many requests wait as asked."""
        most = (self.llm.config.max_num_seqs or 0) + self.num_waiting
        while self.llm.engine.stats.unfinished_requests < most:
            self._add(256)

    def _add(self, max_tokens: int) -> None:
        prompt = [self._rng.randrange(260, 4_000) for _ in range(56)]
        params = replace(self._params, max_tokens=max_tokens, seed=self._rng.randrange(2**31))
        self.llm.add_request(prompt, params, stream=self.kind.stream)


def measure_scheduling(num_steps: int) -> list[Cost]:
    """Median step for 256 running requests, then for long queues under every queue policy.

    Prefix caching is on. The queues of one policy take turns, so that a slow phase of the
    machine hits all of them. Then follow the median steps of `measure_texts`.
    """
    costs = _measure([Load("fcfs", 0)], num_steps)
    print(f"{NUM_RUNNING} running, none waiting: {1e3 * costs[0].median:.3f} ms per step")
    for policy in sorted(PART_KINDS["queue_policy"].known()):
        new = _measure([Load(policy, n) for n in NUM_WAITING], num_steps)
        times = " / ".join(f"{1e3 * cost.median:.3f}" for cost in new)
        queues = " / ".join(f"{cost.num_waiting:,}" for cost in new)
        flat = new[-1].median / new[0].median
        print(f"{policy:<16}{times} ms with {queues} waiting: {flat:.3f} times", flush=True)
        costs += new
    return costs + measure_texts(num_steps) + _measure_growth(num_steps)


def _measure_growth(num_steps: int) -> list[Cost]:
    """Median CPU seconds of a step or of a burst, or those of all steps together."""
    costs = [Cost(*measured) for measured in measure_growth(num_steps)]
    for cost in costs:
        print(f"{cost.policy}, {cost.num_waiting:,}: {1e3 * cost.median:.3f} ms", flush=True)
    return costs


def measure_texts(num_steps: int) -> list[Cost]:
    """Median `LLM.step` for each kind of requests, with no and with 20,000 requests waiting."""
    costs = []
    for kind in KINDS:
        loads = [TextLoad(kind, n) for n in NUM_WAITING_TEXTS]
        for _ in range(num_steps):
            for load in loads:
                load.step()
        for load in loads:
            load.llm.close()
        new = [Cost(kind.name, load.num_waiting, load.seconds) for load in loads]
        times = " / ".join(f"{1e3 * cost.median:.3f}" for cost in new)
        queues = " / ".join(f"{cost.num_waiting:,}" for cost in new)
        print(f"step of {NUM_RUNNING} {kind.name}: {times} ms with {queues} waiting", flush=True)
        costs += new
    return costs


def _measure(loads: list[Load], num_steps: int) -> list[Cost]:
    for _ in range(num_steps):
        for load in loads:
            load.step()
    return [Cost(load.policy, load.num_waiting, load.seconds) for load in loads]
