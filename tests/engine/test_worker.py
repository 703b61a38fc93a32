"""The loop of a rank's process, and what it says of a failure; no process is started."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest

from engine.ranks.channel import Channel, PlanCodec
from engine.ranks.worker import Failure, LostPeerError, serve
from engine.types import KVGeometry, ModelRunner, StepHandle, StepPlan, StepResult
from tests.engine.waits import PATIENCE


class _Runner(ModelRunner):
    """A runner whose steps end when `gate` is set; `log` tells what was asked of it."""

    name = "gated"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.log: list[str] = []

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        return ()

    def execute(self, plan: StepPlan) -> StepHandle:
        self.log.append(f"execute {plan.step_id}")
        return _Handle(self, plan.step_id)

    def close(self) -> None:
        self.log.append("close")


class _Handle(StepHandle):
    def __init__(self, runner: _Runner, step_id: int) -> None:
        self._runner = runner
        self._step_id = step_id

    def result(self) -> StepResult:
        assert self._runner.gate.wait(PATIENCE)
        self._runner.log.append(f"result {self._step_id}")
        return StepResult(self._step_id, [[7]], 0.0)

    def done(self) -> bool:
        return self._runner.gate.is_set()


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


@pytest.mark.parametrize("reports", [True, False])
def test_a_plan_starts_while_the_one_before_runs_and_both_end_before_the_runner(
    reports: bool,
) -> None:
    ours, theirs = (Channel(fileno=end.detach()) for end in socket.socketpair())
    runner, codec = _Runner(), PlanCodec()
    rank = threading.Thread(
        target=serve, args=(runner, theirs), kwargs={"reports": reports}, daemon=True
    )
    rank.start()
    for step_id in range(2):
        ours.post(codec.encode(StepPlan(step_id, decode=(1,))))
        _until(lambda: len(runner.log) > step_id)  # noqa: B023
    assert runner.log == ["execute 0", "execute 1"]
    runner.gate.set()
    _until(lambda: len(runner.log) == 4)
    # By now it sleeps, and another plan wakes it.
    time.sleep(0.1)
    runner.gate.clear()
    ours.post(codec.encode(StepPlan(2, decode=(1,))))
    _until(lambda: runner.log[-1] == "execute 2")
    ours.shutdown(socket.SHUT_WR)
    time.sleep(0.1)
    runner.gate.set()
    rank.join(PATIENCE)
    assert runner.log[2:] == ["result 0", "result 1", "execute 2", "result 2", "close"]
    theirs.close()
    # Nobody asks for the last result any more.
    told = [ours.receive() for _ in range(2)]
    assert [result and result.step_id for result in told] == ([0, 1] if reports else [None, None])
    ours.close()


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("lost", [False, True])
def test_a_failure_says_whether_another_rank_was_the_reason(lost: bool, explicit: bool) -> None:
    """However the runner that had it has wrapped the collective's error."""
    inner = LostPeerError("connection closed") if lost else OSError("no memory")
    try:
        try:
            raise inner
        except Exception as error:
            if explicit:
                raise ValueError("the step failed") from error
            raise ValueError("the step failed")  # noqa: B904
    except ValueError as error:
        failure = Failure.of(error)
    assert failure.lost_peer == lost
    assert str(failure.error) == "the step failed"
    assert str(inner) in failure.traceback
