"""What the scheduler's cost grows with: long prompts that wait, bursts, many prompts, users."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable

from config import Config
from engine.parts import PART_KINDS
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from engine.types import KVGeometry, StepResult
from memory.block_manager import PrefixCacheManager
from sampling_params import SamplingParams

BLOCK_SIZE = 256
LONG_PROMPT = 131_072
BURSTS = (256, 1_024)
NUM_PROMPTS = (2_500, 10_000)
NUM_OUTPUTS = (750, 3_000)
_VOCAB_SIZE = 151_936


class Loop:
    """A scheduler whose steps cost nothing but its own work.

    Args:
        options: options of `Config`.

    Attributes:
        seconds: CPU seconds of `schedule` and `commit` in each step.
    """

    def __init__(self, num_blocks: int, **options: object) -> None:
        config = Config(model="none", kvcache_block_size=BLOCK_SIZE, **options)  # type: ignore[arg-type]
        blocks = PrefixCacheManager(config, KVGeometry(1, 1, 1, BLOCK_SIZE, num_blocks, 2))
        self.scheduler = ContinuousScheduler(config, blocks, time.perf_counter)
        self.seconds: list[float] = []
        self._num_requests = 0

    def add(self, prompt: list[int], max_tokens: int, **params: object) -> Sequence:
        """Queue a request."""
        sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
        seq = Sequence(
            self._num_requests, prompt, sampling, max_total_tokens=len(prompt) + max_tokens
        )
        self._num_requests += 1
        self.scheduler.add(seq)
        return seq

    def step(self) -> bool:
        """Plan a step and commit it; False if there was nothing to plan."""
        begin = time.process_time()
        plan = self.scheduler.schedule()
        planned = time.process_time()
        if plan is None:
            return False
        result = StepResult(plan.step_id, [[7] for _ in plan.sampled_slots], planned)
        executed = time.process_time()
        self.scheduler.commit(plan, result)
        self.seconds.append(time.process_time() - executed + planned - begin)
        return True

    def run(self) -> None:
        """Step until all requests have ended."""
        while self.step():
            pass


def _prompt(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(_VOCAB_SIZE) for _ in range(num_tokens)]


def waiting_prompt(num_steps: int) -> list[float]:
    """Seconds of each step in which a prompt that is almost all cached waits for blocks."""
    rng, num_long = random.Random(0), LONG_PROMPT // BLOCK_SIZE
    loop = Loop(num_long + 64, max_num_seqs=8, max_num_batched_tokens=2 * LONG_PROMPT)
    prompt = _prompt(rng, LONG_PROMPT)
    for held in (prompt, _prompt(rng, 40 * BLOCK_SIZE)):
        loop.add(held, 4_000)
    loop.step()
    waiting = loop.add(prompt + _prompt(rng, 30 * BLOCK_SIZE), 1)
    loop.step()
    loop.seconds.clear()
    for _ in range(num_steps):
        loop.step()
    assert waiting.slot is None
    return loop.seconds


def burst(admission: str, count: int) -> float:
    """Seconds of a step that admits so many requests."""
    rng = random.Random(0)
    loop = Loop(
        8 * count, max_num_seqs=count, max_num_batched_tokens=2**20, admission_policy=admission
    )
    for _ in range(count):
        loop.add(_prompt(rng, rng.randint(100, 500)), rng.randint(64, 1_024))
    loop.step()
    return loop.seconds[0]


def distinct_prompts(count: int) -> float:
    """Seconds of all steps for so many requests that share nothing."""
    rng = random.Random(0)
    loop = Loop(1_024, max_num_seqs=256)
    for _ in range(count):
        loop.add(_prompt(rng, rng.randint(200, 300)), 4)
    loop.run()
    return sum(loop.seconds)


def outputs_of_one_prompt(count: int) -> float:
    """Seconds of all steps for so many outputs of one prompt of 4,000 tokens."""
    rng = random.Random(0)
    loop = Loop(1_024, max_num_seqs=256, max_num_batched_tokens=1_024)
    prompt = _prompt(rng, 4_000)
    for _ in range(count):
        loop.add(prompt, 4)
    loop.run()
    return sum(loop.seconds)


def users(count: int) -> float:
    """Seconds of all steps for so many users with one request each, under `fair_share`."""
    rng = random.Random(0)
    loop = Loop(1_024, max_num_seqs=256, queue_policy="fair_share")
    for i in range(count):
        loop.add(_prompt(rng, rng.randint(200, 300)), 4, user=str(i))
    loop.run()
    return sum(loop.seconds)


def measure_growth(num_steps: int) -> Iterable[tuple[str, int, list[float]]]:
    """Yield what is measured, how many there were of what the cost may grow with, and seconds."""
    yield "a long prompt waits for blocks", LONG_PROMPT, waiting_prompt(num_steps)
    for name in sorted(PART_KINDS["admission_policy"].known()):
        for count in BURSTS:
            yield f"admissions in one step, {name}", count, [burst(name, count) for _ in range(5)]
    totals: tuple[tuple[str, Callable[[int], float], tuple[int, ...]], ...] = (
        ("requests with prompts of their own", distinct_prompts, NUM_PROMPTS),
        ("outputs of one prompt", outputs_of_one_prompt, NUM_OUTPUTS),
        ("users with one request each", users, NUM_PROMPTS),
    )
    for name, total, counts in totals:
        for count in counts:
            yield name, count, [total(count)]
