"""Uploads through pinned buffers that take turns, on a fake device that reads them late."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.device_state import Staging
from tests.engine import fake_cuda
from tests.engine.fake_cuda import FakeStream

CUDA = torch.device("cuda")
# Groups that may be under way without a wait; what they upload is in as many buffers.
NUM_BUFFERS = 3


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    return fake_cuda.install(monkeypatch)


def _group(staging: Staging, arrays: list[np.ndarray[Any, Any]]) -> list[Tensor]:
    with staging.group():
        return [staging.upload(array) for array in arrays]


def _assert_all(uploads: list[tuple[Tensor, np.ndarray[Any, Any]]]) -> None:
    for made, array in uploads:
        assert made.dtype == torch.from_numpy(array).dtype
        assert made.tolist() == array.tolist()


def _random_array(rng: random.Random) -> np.ndarray[Any, Any]:
    dtype = rng.choice([np.int64, np.int32, np.float32])
    shape = rng.choice([(rng.randint(0, 40),), (rng.randint(1, 6), rng.randint(1, 9))])
    count = int(np.prod(shape))
    return np.array([rng.randrange(1 << 20) for _ in range(count)], dtype=dtype).reshape(shape)


@pytest.mark.parametrize("seed", range(20))
def test_arrays_arrive_as_they_were_however_late_the_device_reads(
    stream: FakeStream, seed: int
) -> None:
    """Buffers are too small at first, and the host runs ahead as far as it is let."""
    rng = random.Random(seed)
    staging = Staging(CUDA, 64)
    uploads = []
    for _ in range(40):
        arrays = [_random_array(rng) for _ in range(rng.randint(1, 5))]
        uploads += list(zip(_group(staging, arrays), arrays, strict=True))
        stream.run(rng.choice([0, 0, 0, 1, 5, 100]))
    stream.run()
    _assert_all(uploads)


def test_a_buffer_is_waited_for_when_its_turn_comes_again(stream: FakeStream) -> None:
    staging = Staging(CUDA)
    uploads = []
    for number in range(NUM_BUFFERS + 2):
        array = np.full(5, number)
        uploads += list(zip(_group(staging, [array]), [array], strict=True))
        # The copy and the event of each group that has not been waited for.
        assert len(stream) == 2 * min(number + 1, NUM_BUFFERS)
    assert [made.tolist()[0] for made, _ in uploads] == [0, 1, 0, 0, 0]
    stream.run()
    _assert_all(uploads)


def test_no_wait_while_the_device_keeps_up(
    stream: FakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Staging(CUDA)
    forced: list[int | None] = []
    run = stream.run
    monkeypatch.setattr(stream, "run", forced.append)
    for number in range(3 * NUM_BUFFERS):
        _group(staging, [np.full(5, number)])
        run()
    assert not forced


def test_on_a_cpu_arrays_are_wrapped_in_place() -> None:
    array = np.arange(5)
    (made,) = _group(Staging(torch.device("cpu")), [array])
    array[2] = 9
    assert made.tolist() == [0, 1, 9, 3, 4]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_array_may_go_to_where_one_lies(stream: FakeStream, device: str) -> None:
    staging = Staging(torch.device(device))
    target = torch.zeros(2, 3, dtype=torch.int64)
    with staging.group():
        made = staging.upload(np.arange(6).reshape(2, 3), out=target)
    assert made is target
    assert target.any() == (device == "cpu")
    stream.run()
    assert target.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_group_that_fails_is_waited_for_as_well(stream: FakeStream) -> None:
    staging = Staging(CUDA)
    uploads = []

    def fails(array: np.ndarray[Any, Any]) -> None:
        with staging.group():
            uploads.append((staging.upload(array), array))
            raise RuntimeError("planted")

    for number in range(NUM_BUFFERS + 1):
        with pytest.raises(RuntimeError, match="planted"):
            fails(np.full(5, number))
    assert len(stream) == 2 * NUM_BUFFERS
    stream.run()
    _assert_all(uploads)
