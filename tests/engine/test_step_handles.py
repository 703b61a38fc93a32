from __future__ import annotations

import threading
import time

import pytest
import torch

from engine.step_handles import HostLauncher, StepOutput
from engine.types import StepPlan, StepResult
from utils.errors import StepError

IN_THREAD = pytest.mark.parametrize("in_thread", [False, True])


@IN_THREAD
def test_the_result_has_one_token_per_row(in_thread: bool) -> None:
    launcher = HostLauncher(time.perf_counter, in_thread=in_thread)
    handle = launcher.launch(StepPlan(5), lambda: StepOutput(torch.tensor([7, 8])))
    result = handle.result()
    assert result == StepResult(5, [[7], [8]], result.ended_at)
    assert handle.result() == result
    launcher.close()


@IN_THREAD
def test_times_are_those_of_the_clock_and_of_the_step(in_thread: bool) -> None:
    """The clock is read before and after the step, whenever its result is asked for."""
    moments = iter([3.0, 5.0, 7.0, 11.0])
    launcher = HostLauncher(lambda: next(moments), in_thread=in_thread)
    first = launcher.launch(StepPlan(0), lambda: StepOutput(torch.tensor([7])))
    assert first.result().ended_at == 5.0
    assert first.result().device_seconds is None
    second = launcher.launch(StepPlan(1, timed=True), lambda: StepOutput(torch.tensor([7])))
    assert (second.result().ended_at, second.result().device_seconds) == (11.0, 4.0)
    assert first.result().ended_at == 5.0
    launcher.close()


@IN_THREAD
def test_a_failure_comes_with_the_result(in_thread: bool) -> None:
    def fails() -> StepOutput:
        raise RuntimeError("planted")

    launcher = HostLauncher(time.perf_counter, in_thread=in_thread)
    handle = launcher.launch(StepPlan(5), fails)
    for _ in range(2):
        with pytest.raises(StepError, match="step 5 failed: RuntimeError: planted"):
            handle.result()
    assert launcher.launch(StepPlan(6), lambda: StepOutput(torch.tensor([1]))).result().tokens == [
        [1]
    ]
    launcher.close()


@IN_THREAD
def test_an_error_that_is_meant_for_the_user_comes_as_it_is(in_thread: bool) -> None:
    error = StepError("logits processor 3 failed")

    def fails() -> StepOutput:
        raise error

    launcher = HostLauncher(time.perf_counter, in_thread=in_thread)
    with pytest.raises(StepError) as caught:
        launcher.launch(StepPlan(5), fails).result()
    assert caught.value is error
    launcher.close()


def test_a_thread_returns_at_once_and_keeps_the_order() -> None:
    launcher = HostLauncher(time.perf_counter, in_thread=True)
    gate = threading.Event()
    order: list[int] = []

    def step(number: int) -> StepOutput:
        gate.wait(10)
        order.append(number)
        return StepOutput(torch.tensor([number]))

    handles = [launcher.launch(StepPlan(i), lambda i=i: step(i)) for i in range(5)]  # type: ignore[misc]
    assert order == []
    gate.set()
    assert [handle.result().tokens for handle in handles] == [[[i]] for i in range(5)]
    assert order == list(range(5))
    launcher.close()


def test_closing_a_thread_waits_for_what_was_started() -> None:
    launcher = HostLauncher(time.perf_counter, in_thread=True)
    done: list[bool] = []

    def step() -> StepOutput:
        done.append(True)
        return StepOutput(torch.tensor([1]))

    for i in range(3):
        launcher.launch(StepPlan(i), step)
    launcher.close()
    assert done == [True] * 3


@IN_THREAD
def test_an_error_that_is_meant_for_the_user_is_no_cause_of_itself(in_thread: bool) -> None:
    """An exception that is its own cause would have who looks for causes run in circles."""

    def fails() -> StepOutput:
        raise StepError("planted")

    launcher = HostLauncher(time.perf_counter, in_thread=in_thread)
    with pytest.raises(StepError, match=r"^planted$") as caught:
        launcher.launch(StepPlan(5), fails).result()
    assert caught.value.__cause__ is None
    launcher.close()


def test_what_would_end_a_thread_ends_its_step_alone() -> None:
    def leaves() -> StepOutput:
        raise SystemExit(3)

    launcher = HostLauncher(time.perf_counter, in_thread=True)
    handle = launcher.launch(StepPlan(5), leaves)
    for _ in range(2):
        with pytest.raises(StepError, match="step 5 failed: SystemExit: 3"):
            handle.result()
    assert launcher.launch(StepPlan(6), lambda: StepOutput(torch.tensor([1]))).result().tokens == [
        [1]
    ]
    launcher.close()
