"""The contract of a model runner: subclass ModelRunnerContract and pytest does the rest."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from config import Config
from engine.parts import resolve
from engine.types import (
    BlockCopy,
    BlockUpdate,
    ModelRunner,
    NewRequest,
    PrefillChunk,
    StepHandle,
    StepPlan,
)
from sampling_params import SamplingParams
from utils.checkpoint import open_checkpoint
from utils.errors import EngineClosedError

BLOCK_SIZE, NUM_BLOCKS, NUM_SLOTS = 16, 24, 4
LENGTHS = (5, 37, 16, 1)
NUM_DECODES = 18


@dataclass
class Request:
    """A request as the plans see it.

    Attributes:
        tokens: prompt and output so far.
        blocks: enough for all that will come.
        limit: most tokens, prompt and output together.
    """

    slot: int
    tokens: list[int]
    blocks: list[int]
    sampling: SamplingParams
    limit: int = 128
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def output(self) -> list[int]:
        """The tokens sampled so far."""
        return self.tokens[self.num_prompt :]


class Steps:
    """Writes plans by hand and runs them, one at a time unless told otherwise."""

    def __init__(self, runner: ModelRunner, depth: int) -> None:
        self.runner = runner
        self.depth = depth
        self._next_step_id = self._next_request_id = 0
        self._last_end = runner.now()
        self._in_slot: dict[int, Request] = {}

    def enter(
        self,
        requests: list[Request],
        *,
        start: int = 0,
        count: int | None = None,
        decodes: list[Request] | tuple[()] = (),
        copies: tuple[BlockCopy, ...] = (),
    ) -> None:
        """New requests compute `count` positions from `start` on, all the rest if None."""
        self._next_request_id += len(requests)
        first_id = self._next_request_id - len(requests)
        news = [
            NewRequest(
                r.slot,
                first_id + i,
                tuple(r.tokens),
                r.sampling,
                r.sampling.seed or 0,
                max_total_tokens=r.limit,
            )
            for i, r in enumerate(requests)
        ]
        self._in_slot |= {r.slot: r for r in requests}
        updates = tuple(BlockUpdate(r.slot, 0, tuple(r.blocks)) for r in requests)
        self._finish(self._execute(requests, start, count, decodes, tuple(news), updates, copies))

    def chunk(self, request: Request, start: int, count: int, decodes: list[Request]) -> None:
        """A part of a prompt beside decodes."""
        self._finish(self._execute([request], start, count, decodes))

    def decode(
        self, requests: list[Request], times: int, *, in_flight: int = 1, count: int = 1
    ) -> None:
        """So many steps, `in_flight` of them started before the first one's result is taken.

        Args:
            count: most positions of a row.
        """
        started: list[tuple[StepPlan, StepHandle]] = []
        for _ in range(times):
            started.append(self._execute([], 0, None, requests, count=count))
            if len(started) == in_flight:
                self._finish(started.pop(0))
        for step in started:
            self._finish(step)

    def _execute(
        self,
        prefills: list[Request],
        start: int,
        chunk: int | None,
        decodes: list[Request] | tuple[()],
        news: tuple[NewRequest, ...] = (),
        updates: tuple[BlockUpdate, ...] = (),
        copies: tuple[BlockCopy, ...] = (),
        count: int = 1,
    ) -> tuple[StepPlan, StepHandle]:
        chunks = []
        for request in prefills:
            num_tokens = len(request.tokens) - start if chunk is None else chunk
            samples = start + num_tokens == len(request.tokens) < request.limit
            chunks.append(PrefillChunk(request.slot, start, num_tokens, samples))
        slots = tuple(request.slot for request in decodes)
        counts = (count,) * len(slots) if count > 1 else ()
        plan = StepPlan(
            self._next_step_id, news, updates, tuple(chunks), slots, copies, counts, timed=True
        )
        self._next_step_id += 1
        return plan, self.runner.execute(plan)

    def _finish(self, step: tuple[StepPlan, StepHandle]) -> None:
        plan, handle = step
        result = handle.result()
        assert result.step_id == plan.step_id
        assert self._last_end <= result.ended_at <= self.runner.now()
        self._last_end = result.ended_at
        assert result.device_seconds is not None
        assert result.device_seconds >= 0
        most = [1] * (len(result.tokens) - len(plan.decode)) + list(plan.decode_counts)
        for slot, new, count in zip(plan.sampled_slots, result.tokens, most, strict=True):
            request = self._in_slot[slot]
            assert 1 <= len(new) <= count
            request.tokens += new
            assert len(request.tokens) <= request.limit


class ModelRunnerContract:
    """What a runner must do: tokens depend on nothing but the request.

        class TestMyRunner(ModelRunnerContract):
            make_runner = MyRunner

    Tokens are compared, so logits must agree to well below the gaps between the best two; in
    float32 they do.

    Attributes:
        make_runner: the class or a factory.
        model: the checkpoint.
        options: further options of `Config`.
    """

    make_runner: ClassVar[Any]
    model: ClassVar[str] = str(Path(__file__).parents[2] / "assets" / "qwen3-tiny-python")
    options: ClassVar[dict[str, Any]] = {}

    # One runner for all tests: what one leaves in slots and blocks must not matter to the next.
    @pytest.fixture(scope="class", params=[0, 1], ids=["depth0", "depth1"])
    @classmethod
    def steps(cls, request: pytest.FixtureRequest) -> Iterator[Steps]:
        with cls.open(request.param) as runner:
            yield Steps(runner, request.param)

    @pytest.fixture(scope="class")
    @classmethod
    def alone(cls) -> Iterator[Steps]:
        with cls.open() as runner:
            yield Steps(runner, 0)

    @classmethod
    @contextmanager
    def open(cls, depth: int = 0) -> Iterator[ModelRunner]:
        """A runner of its own."""
        options = {
            "device": "cpu",
            "max_num_seqs": NUM_SLOTS,
            "max_num_batched_tokens": 64,
            "max_model_len": 128,
            "kvcache_block_size": BLOCK_SIZE,
            "num_kvcache_blocks": NUM_BLOCKS,
            "pipeline_depth": depth,
            **cls.options,
        }
        checkpoint = open_checkpoint(cls.model)
        make = cls.make_runner
        config = resolve(Config.from_options(cls.model, **options), checkpoint)
        with closing(make(config, checkpoint)) as runner:
            yield runner

    def test_it_has_the_cache_that_was_asked_for(self, steps: Steps) -> None:
        (geometry,) = steps.runner.kv_groups
        assert (geometry.block_size, geometry.num_blocks) == (BLOCK_SIZE, NUM_BLOCKS)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_company_slots_and_blocks_change_nothing(
        self, steps: Steps, alone: Steps, temperature: float
    ) -> None:
        requests = self.requests(temperature)
        steps.enter(requests)
        steps.decode(requests, NUM_DECODES)
        self.check(alone, requests)

    def test_a_prompt_in_chunks_beside_decodes(self, steps: Steps, alone: Steps) -> None:
        requests = self.requests()
        long, others = requests[1], [requests[0], requests[2], requests[3]]
        steps.enter(others)
        steps.enter([long], count=3)
        for start, count in ((3, 13), (16, 1), (17, 19), (36, 1)):
            steps.chunk(long, start, count, others)
        assert len(long.output) == 1
        steps.decode(requests, 3)
        self.check(alone, requests)

    def test_a_prefix_that_another_request_computed(self, steps: Steps, alone: Steps) -> None:
        requests = self.requests()
        first, second = requests[1], requests[0]
        second.tokens = [*first.tokens[:32], 9, 8, 7]
        second.num_prompt = 35
        second.blocks = first.blocks[:2] + second.blocks[:2]
        steps.enter([first])
        steps.enter([second], start=32)
        steps.decode([first, second], 4)
        self.check(alone, [first, second])

    def test_copies_of_blocks_that_another_request_computed(
        self, steps: Steps, alone: Steps
    ) -> None:
        """Three requests begin with all but a token of a prompt, and go on beside its own."""
        requests = self.requests()
        first, others = requests[1], [requests[0], requests[2], requests[3]]
        prompt, copies = first.tokens[:32], []
        steps.enter([first])
        spare = [block for block in range(NUM_BLOCKS) if block not in first.blocks]
        for i, request in enumerate(others):
            request.tokens, request.num_prompt = list(prompt), 32
            request.blocks = [first.blocks[0], *spare[2 * i : 2 * i + 2]]
            copies.append(BlockCopy(first.blocks[1], request.blocks[1]))
        steps.enter(others, start=31, decodes=[first], copies=tuple(copies))
        steps.decode(requests, 4)
        self.check(alone, requests)

    def test_a_slot_and_blocks_that_were_used_before(self, steps: Steps, alone: Steps) -> None:
        old, new = self.requests()[1], self.requests()[0]
        new.slot, new.blocks = old.slot, old.blocks[:2]
        steps.enter([old])
        steps.decode([old], 5)
        steps.enter([new])
        steps.decode([new], NUM_DECODES)
        self.check(alone, [old, new])

    def test_equal_prompts_differ_by_their_seeds_alone(self, steps: Steps) -> None:
        first, second, third, _ = self.requests(temperature=1.0)
        for request in (second, third):
            request.tokens = list(first.tokens)
            request.num_prompt = first.num_prompt
        third.sampling = first.sampling
        steps.enter([first, second, third])
        steps.decode([first, second, third], NUM_DECODES)
        assert first.output == third.output != second.output

    def test_a_request_that_starts_over(self, steps: Steps, alone: Steps) -> None:
        """As after a preemption: prompt and output are computed again, elsewhere."""
        request, other = self.requests()[1], self.requests()[2]
        steps.enter([request])
        steps.decode([request], 5)
        request.slot, request.blocks = other.slot, other.blocks + request.blocks[::-1]
        steps.enter([request])
        steps.decode([request], 5)
        self.check(alone, [request])

    def test_several_steps_in_flight(self, steps: Steps, alone: Steps) -> None:
        requests = self.requests()
        steps.enter(requests)
        steps.decode(requests, NUM_DECODES, in_flight=steps.depth + 1)
        self.check(alone, requests)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_rows_of_several_positions(
        self, steps: Steps, alone: Steps, temperature: float
    ) -> None:
        """What a runner drafts changes how many tokens a step gives, and none of them."""
        requests = self.requests(temperature)
        steps.enter(requests)
        for count in (2, 4, 1, 3):
            steps.decode(requests, 1, count=count)
        steps.decode(requests, 2, count=3, in_flight=steps.depth + 1)
        assert all(7 <= len(request.output) <= NUM_DECODES for request in requests)
        self.check(alone, requests)

    def test_no_token_is_kept_beyond_the_limit(self, steps: Steps, alone: Steps) -> None:
        """The plan allows more positions than the limit leaves, as a plan made ahead may."""
        request = self.requests()[0]
        request.limit = request.num_prompt + 4
        steps.enter([request])
        while len(request.tokens) < request.limit:
            steps.decode([request], 1, count=4)
        self.check(alone, [request])

    def test_a_prompt_without_output(self, steps: Steps, alone: Steps) -> None:
        """It gives no token, and what it computed can be used by others."""
        requests = self.requests()
        first, second = requests[1], requests[0]
        first.limit = first.num_prompt
        steps.enter([first])
        assert first.output == []
        second.tokens = [*first.tokens[:32], 9, 8, 7]
        second.num_prompt = 35
        second.blocks = first.blocks[:2] + second.blocks[:2]
        steps.enter([second], start=32)
        steps.decode([second], 3)
        self.check(alone, [second])

    def test_the_clock_runs_forward(self, steps: Steps) -> None:
        moment = steps.runner.now() + 1e-3
        steps.runner.wait_until(moment)
        assert steps.runner.now() >= moment
        steps.runner.wait_until(moment - 1.0)
        assert steps.runner.now() >= moment

    def test_a_request_that_leaves_is_not_computed(self, steps: Steps, alone: Steps) -> None:
        requests = self.requests()
        steps.enter(requests)
        for count in range(len(requests), 0, -1):
            steps.decode(requests[:count], 2)
        self.check(alone, requests)
        assert [len(request.output) for request in requests] == [9, 7, 5, 3]

    def test_after_close_nothing_is_executed(self) -> None:
        with self.open() as runner:
            runner.close()
            with pytest.raises(EngineClosedError):
                runner.execute(StepPlan(0))

    def requests(self, temperature: float = 0.0) -> list[Request]:
        """One for each slot and length, with blocks in disorder."""
        rng = random.Random(0)
        blocks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        made = []
        for slot, length in enumerate(LENGTHS):
            count = -(-(length + NUM_DECODES) // BLOCK_SIZE)
            own, blocks = blocks[:count], blocks[count:]
            params = SamplingParams(temperature=temperature, seed=slot + 1)
            tokens = [rng.randrange(1, 200) for _ in range(length)]
            made.append(Request(NUM_SLOTS - 1 - slot, tokens, own, params))
        return made

    def check(self, alone: Steps, requests: list[Request]) -> None:
        """Each request has the tokens that it gets alone, computed at once, blocks in order."""
        for request in requests:
            assert request.output
            tokens, blocks = request.tokens[: request.num_prompt], list(range(NUM_BLOCKS))
            same = Request(0, tokens, blocks[: 128 // BLOCK_SIZE], request.sampling)
            alone.enter([same])
            alone.decode([same], len(request.output) - 1)
            assert request.output == same.output
