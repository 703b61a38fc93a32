"""The ring and the compact form of plans."""

from __future__ import annotations

import pickle
import random
import sys
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.transport import Close, PlanDecoder, PlanEncoder, Ring, shared_file
from engine.types import (
    BlockCopy,
    BlockUpdate,
    NewRequest,
    PrefillChunk,
    RowReport,
    StepPlan,
    StepResult,
)
from engine.worker import Done
from sampling_params import SamplingParams


def _nothing(*args: object) -> None:
    del args


def _rings(num_readers: int, capacity: int) -> list[Ring]:
    """The writer's and each reader's view of one ring."""
    with shared_file() as file:
        Ring.allocate(file, num_readers, capacity)
        return [Ring(file.fileno(), num_readers, capacity) for _ in range(1 + num_readers)]


@pytest.mark.parametrize("capacity", [64, 1000])
def test_messages_of_any_length_reach_every_reader_in_order(capacity: int) -> None:
    rng = random.Random(capacity)
    messages = [rng.randbytes(rng.choice([0, 1, 55, 56, 57, 64, 500, 5000])) for _ in range(200)]
    writer, *readers = _rings(3, capacity)
    got: list[list[bytes]] = [[] for _ in readers]

    def read(index: int) -> None:
        pause = random.Random(index)
        while len(got[index]) < len(messages):
            if readers[index].readable(index):
                got[index].append(readers[index].receive(index))
            time.sleep(pause.choice([0, 0, 1e-4]))

    threads = [threading.Thread(target=read, args=(index,), daemon=True) for index in range(3)]
    for thread in threads:
        thread.start()
    for message in messages:
        writer.send(message, wake=_nothing, wait=lambda: time.sleep(0))
    for thread in threads:
        thread.join(30)
    assert got == [messages] * 3
    for ring in (writer, *readers):
        ring.close()


def test_a_full_ring_waits_for_its_slowest_reader() -> None:
    writer, fast, slow = _rings(2, 64)
    waits = 0

    def wait() -> None:
        nonlocal waits
        waits += 1
        if waits == 3:
            assert slow.receive(1) == b"x" * 40

    writer.send(b"x" * 40, wake=_nothing, wait=_nothing)
    assert fast.receive(0) == b"x" * 40
    writer.send(b"y" * 40, wake=_nothing, wait=wait)
    assert waits == 3
    assert fast.receive(0) == slow.receive(1) == b"y" * 40


def test_only_sleepers_are_woken_and_once() -> None:
    writer, _, second = _rings(2, 1000)
    woken: list[int] = []
    second.sleeps(1, True)
    for _ in range(3):
        writer.send(b"m", wake=woken.append, wait=_nothing)
    assert woken == [1]
    second.sleeps(1, True)
    second.sleeps(1, False)
    writer.send(b"m", wake=woken.append, wait=_nothing)
    assert woken == [1]


_INT = st.integers(0, 2**31)
_INTS = st.lists(_INT, max_size=9).map(tuple)
_PLANS = st.builds(
    StepPlan,
    _INT,
    st.lists(
        st.builds(
            NewRequest,
            _INT,
            _INT,
            _INTS,
            st.builds(SamplingParams, temperature=st.floats(0, 9), seed=st.none() | _INT),
            st.integers(0, 2**63 - 1),
        ),
        max_size=3,
    ).map(tuple),
    st.lists(st.builds(BlockUpdate, _INT, _INT, _INTS), max_size=3).map(tuple),
    st.lists(st.builds(PrefillChunk, _INT, _INT, _INT, st.booleans()), max_size=3).map(tuple),
    # Few sets, so that they repeat.
    st.sampled_from([(), (1,), (2, 1), tuple(range(300))]),
    st.lists(st.builds(BlockCopy, _INT, _INT), max_size=3).map(tuple),
)


@settings(deadline=None, max_examples=100)
@given(st.lists(_PLANS, max_size=6))
def test_plans_come_out_as_they_went_in(plans: list[StepPlan]) -> None:
    encode, decode = PlanEncoder(), PlanDecoder()
    messages: list[StepPlan | Close] = [*plans, Close()]
    assert [decode(encode(message)) for message in messages] == messages


def _decode_step(step: int, num_updates: int) -> StepPlan:
    """A decode step of 256 requests, of which some enter another block of their long contexts."""
    slots = random.Random(step).sample(range(512), num_updates)
    updates = tuple(BlockUpdate(slot, 250, (60_000 + step + slot,)) for slot in slots)
    return StepPlan(100_000 + step, (), updates, (), tuple(range(100, 356)))


@pytest.mark.parametrize("num_updates", [0, 1, 16, 256])
def test_a_decode_step_of_256_requests_takes_few_bytes(num_updates: int) -> None:
    """Also the first one, and one in which every request needs a block."""
    encode = PlanEncoder()
    assert len(encode(_decode_step(0, num_updates))) <= 8 * 1024
    assert len(encode(_decode_step(1, 0))) < 128


def _calls(num_requests: int, num_updates: int) -> int:
    """Functions called, Python's and C's, to send and read the third decode step of some."""
    encode, decode = PlanEncoder(), PlanDecoder()
    writer, reader = _rings(1, 1 << 20)
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    for i in range(3):
        plan = replace(_decode_step(i, num_updates), decode=tuple(range(num_requests)))
        count = 0
        sys.setprofile(profile)
        writer.send(encode(plan), wake=_nothing, wait=_nothing)
        got = decode(reader.receive(0))
        sys.setprofile(None)
        assert got == plan
    return count


def test_a_decode_step_of_256_requests_is_sent_and_read_with_the_calls_of_one() -> None:
    """With blocks of 256 tokens one request a step needs another one. Measured: 89 calls, 37 us."""
    assert _calls(256, 1) == _calls(1, 1) < 150
    # What needs more blocks brings its own calls, and as many for each.
    more = [_calls(256, n) - _calls(256, 0) for n in (1, 16)]
    assert more[1] <= 16 * more[0]


_SCORES = [{1: -1.0}]


@pytest.mark.parametrize(
    "result",
    [
        StepResult(3, [], 2.0),
        StepResult(3, [[1], [2]], 2.0),
        StepResult(3, [[1], [2, 3, 4]], 2.0, reports={1: RowReport(values=({"a": 1},))}),
        StepResult(3, [[1]], 2.0, [_SCORES], [_SCORES, []], 0.25),
        StepResult(3, [], 2.0, [], [_SCORES], 0.0),
    ],
)
def test_results_come_out_as_they_went_in(result: StepResult) -> None:
    done = pickle.loads(pickle.dumps(Done.of(7, result)))
    assert (done.number, done.result(2.0)) == (7, result)


def test_a_row_without_tokens_stays_without_them() -> None:
    """A row that reports an error may have none; as many tokens as rows are not one each."""
    result = StepResult(3, [[], [1, 2]], 2.0)
    assert Done.of(0, result).result(2.0).tokens == [[], [1, 2]]
