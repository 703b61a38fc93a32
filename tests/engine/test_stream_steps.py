"""Steps on a stream, whose results wait in pinned buffers that take turns, on a fake device."""

from __future__ import annotations

import random
import time
from collections import deque

import pytest
import torch

from config import Config
from engine.model_runner import step_launcher
from engine.step_handles import HostLauncher, StepOutput, StreamLauncher
from engine.step_scores import StepScores, group_of
from engine.types import StepHandle, StepPlan
from layers.logits import TokenScores
from tests.engine import fake_cuda
from tests.engine.fake_cuda import FakeStream
from utils.errors import StepError

CUDA = torch.device("cuda")
MAX_TOKENS = 8


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    return fake_cuda.install(monkeypatch)


def _launcher(in_flight: int) -> StreamLauncher:
    return StreamLauncher(time.perf_counter, CUDA, MAX_TOKENS, in_flight)


class _Steps:
    """Launches steps as a captured one is: each overwrites the tokens of the one before."""

    def __init__(self, launcher: HostLauncher | StreamLauncher, stream: FakeStream) -> None:
        self._launcher = launcher
        self._stream = stream
        self._tokens = torch.zeros(MAX_TOKENS, dtype=torch.int64)
        self._number = 0
        self.outstanding: deque[tuple[StepHandle, int, list[list[int]]]] = deque()

    def launch(self, size: int = MAX_TOKENS) -> None:
        """Start a step with so many tokens."""
        number = self._number
        self._number += 1
        tokens = torch.arange(size) + 100 * (number + 1)

        def step() -> StepOutput:
            self._stream.enqueue(lambda: self._tokens[:size].copy_(tokens))
            return StepOutput(self._tokens[:size])

        handle = self._launcher.launch(StepPlan(number), step)
        self.outstanding.append((handle, number, [[token] for token in tokens.tolist()]))

    def land(self) -> None:
        """Take the oldest result."""
        handle, number, tokens = self.outstanding.popleft()
        result = handle.result()
        assert (result.step_id, result.tokens) == (number, tokens)
        assert handle.done()

    @property
    def oldest_is_done(self) -> bool:
        return self.outstanding[0][0].done()


def _runner_launcher(depth: int) -> HostLauncher | StreamLauncher:
    """What a runner on CUDA launches with."""
    config = Config(model="model", max_num_seqs=MAX_TOKENS, pipeline_depth=depth)
    return step_launcher(config, time.perf_counter, CUDA)


@pytest.mark.parametrize("in_flight", [1, 2, 3, 5])
def test_as_many_results_as_promised_may_be_outstanding(stream: FakeStream, in_flight: int) -> None:
    steps = _Steps(_launcher(in_flight), stream)
    for _ in range(3):
        for _ in range(in_flight):
            steps.launch()
        # The device is through with all before the host reads the first one.
        stream.run()
        while steps.outstanding:
            steps.land()


@pytest.mark.parametrize("depth", [0, 1])
def test_of_a_runner_a_step_more_may_be_outstanding_than_the_engine_launches(
    stream: FakeStream, depth: int
) -> None:
    """The engine launches another step when the first rank has reported; others may be later.

    `depth` + 1 are in flight, and the other ranks have not read the one before yet.
    """
    steps = _Steps(_runner_launcher(depth), stream)
    for _ in range(depth + 1):
        steps.launch()
    for _ in range(10):
        steps.launch()
        stream.run()
        steps.land()


@pytest.mark.parametrize("seed", range(20))
def test_results_are_those_of_their_steps_whenever_the_device_works(
    stream: FakeStream, seed: int
) -> None:
    rng = random.Random(seed)
    in_flight = rng.randint(1, 4)
    steps = _Steps(_launcher(in_flight), stream)
    for _ in range(200):
        if len(steps.outstanding) < in_flight:
            steps.launch(rng.randint(0, MAX_TOKENS))
        stream.run(rng.choice([0, 0, 1, 2, 3, 20]))
        if steps.oldest_is_done:
            # Then nothing is waited for.
            before = len(stream)
            steps.land()
            assert len(stream) == before
        elif len(steps.outstanding) == in_flight or rng.random() < 0.3:
            steps.land()


def test_a_step_is_done_when_its_tokens_have_arrived(stream: FakeStream) -> None:
    steps = _Steps(_launcher(2), stream)
    steps.launch()
    assert len(stream) > 0
    while stream:
        assert not steps.oldest_is_done
        stream.run(1)
    assert steps.oldest_is_done
    steps.launch()
    steps.land()
    # A wait for the first step runs nothing of the second.
    assert not steps.oldest_is_done
    steps.land()
    assert not stream


def test_scores_arrive_with_their_tokens(stream: FakeStream) -> None:
    launcher = _launcher(3)
    scores = TokenScores(
        tokens=torch.zeros(2, dtype=torch.int64),
        values=torch.zeros(2),
        top_tokens=torch.zeros(2, 1, dtype=torch.int64),
        top_values=torch.zeros(2, 1),
        ranks=torch.zeros(2, 0, dtype=torch.int64),
    )

    def step(number: int) -> StepOutput:
        def run() -> None:
            for name in TokenScores.__slots__:
                getattr(scores, name).fill_(number)

        stream.enqueue(run)
        tokens = torch.full((2,), number)
        groups = {group_of(0, ranked=False): scores}
        return StepOutput(tokens, StepScores(groups, [(0, False, 0), (1, False, 0)], [], 0))

    handles = [launcher.launch(StepPlan(i), lambda i=i: step(i)) for i in range(3)]  # type: ignore[misc]
    stream.run()
    for number, handle in enumerate(handles):
        result = handle.result()
        assert result.tokens == [[number]] * 2
        assert result.logprobs == [[{number: float(number)}]] * 2


def test_a_failure_comes_with_the_result_and_the_next_step_runs(stream: FakeStream) -> None:
    def fails() -> StepOutput:
        raise RuntimeError("planted")

    launcher = _launcher(2)
    steps = _Steps(launcher, stream)
    for _ in range(3):
        handle = launcher.launch(StepPlan(7), fails)
        steps.launch()
        with pytest.raises(StepError, match="step 7 failed: RuntimeError: planted"):
            handle.result()
        steps.land()


def test_closing_waits_for_what_was_started(stream: FakeStream) -> None:
    launcher = _launcher(2)
    steps = _Steps(launcher, stream)
    steps.launch()
    launcher.close()
    assert not stream
    assert steps.oldest_is_done


@pytest.mark.parametrize("asks", [False, True])
def test_a_step_ended_when_the_host_learned_of_it(stream: FakeStream, asks: bool) -> None:
    """The clock is read once for each step, however often it is asked for."""
    moments = iter([3.0, 5.0])
    launcher = StreamLauncher(lambda: next(moments), CUDA, MAX_TOKENS, 2)
    for moment in (3.0, 5.0):
        handle = launcher.launch(StepPlan(0), lambda: StepOutput(torch.tensor([7])))
        stream.run()
        for _ in range(2):
            assert not asks or handle.done()
            assert handle.result().ended_at == moment


def test_a_step_that_was_seen_to_be_done_had_ended_then(stream: FakeStream) -> None:
    """However long its result is left where it is."""
    moment = 3.0
    launcher = StreamLauncher(lambda: moment, CUDA, MAX_TOKENS, 2)
    handle = launcher.launch(StepPlan(0), lambda: StepOutput(torch.tensor([7])))
    assert not handle.done()
    moment = 5.0
    stream.run()
    assert handle.done()
    moment = 7.0
    assert handle.result().ended_at == 5.0


def test_a_device_that_failed_is_told_with_the_result(
    stream: FakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits until the step is done must not wait for ever."""

    def fails(event: fake_cuda.FakeEvent) -> None:
        raise RuntimeError("an illegal memory access")

    handle = _launcher(2).launch(StepPlan(4), lambda: StepOutput(torch.tensor([7])))
    monkeypatch.setattr(fake_cuda.FakeEvent, "query", fails)
    monkeypatch.setattr(fake_cuda.FakeEvent, "synchronize", fails)
    assert handle.done()
    with pytest.raises(StepError, match="step 4 failed: RuntimeError: an illegal memory access"):
        handle.result()


def test_the_device_s_time_is_in_seconds(
    stream: FakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_cuda.FakeEvent, "elapsed_time", lambda begin, end: 250.0)
    launcher = _launcher(2)
    found = []
    for timed in (False, True):
        handle = launcher.launch(StepPlan(0, timed=timed), lambda: StepOutput(torch.tensor([7])))
        stream.run()
        found.append(handle.result().device_seconds)
    assert found == [None, 0.25]
