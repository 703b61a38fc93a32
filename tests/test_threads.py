"""One `LLM` in many threads, in forked children, and inside its own steps."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor

from engine.outputs import make_output
from engine.policies import FirstCome
from engine.turns import Turns, _Waiter
from llm import LLM, SamplingParams
from tests.checkpoints import Checkpoints, random_prompts
from utils.errors import AllmosError, EngineClosedError, EngineUseError, StepError

DEPTHS = pytest.mark.parametrize("depth", [0, 1])
NUM_THREADS = 8
PROMPTS = random_prompts([3, 20, 1, 33, 8, 15, 40, 5], seed=77)


def _llm(path: Path, depth: int, **options: Any) -> LLM:
    defaults = {"device": "cpu", "kvcache_block_size": 16, "max_num_seqs": 6, "max_model_len": 128}
    return LLM(path, **{**defaults, "pipeline_depth": depth, **options})


@pytest.fixture(scope="module")
def small(checkpoints: Checkpoints) -> Path:
    return checkpoints["qwen3-gqa2-wide-heads"]


@pytest.fixture(params=[0, 1], ids=["depth0", "depth1"])
def llm(small: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with _llm(small, request.param) as llm:
        yield llm


def _params(index: int, **more: Any) -> SamplingParams:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": index},
        {"temperature": 0.9, "seed": index, "top_k": 9, "n": 2},
        {"temperature": 0, "repetition_penalty": 1.3, "logits_processors": [_Counting()]},
    ]
    values = {"max_tokens": 3 + index % 9, "ignore_eos": True, **kinds[index % 4], **more}
    return SamplingParams(**values)


class _Counting:
    """A processor with state: it wants to see one more token in every call."""

    def __init__(self) -> None:
        self.num_seen: int | None = None

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        assert self.num_seen in (None, len(token_ids) - 1)
        self.num_seen = len(token_ids)
        return logits


def _tokens(out: dict[str, Any]) -> list[list[int]]:
    return [one["token_ids"] for one in out.get("outputs", [out])]


def _in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(call) for call in calls]]


def _assert_idle(llm: LLM) -> None:
    stats = llm.stats()
    assert stats.unfinished_requests == 0
    assert stats.num_free_blocks == stats.num_blocks
    assert not llm.has_unfinished


class TestCalls:
    """Every thread gets what it would get alone."""

    @staticmethod
    def _mixed(llm: LLM, alone: list[list[list[int]]], rng: random.Random, count: int) -> None:
        for _ in range(count):
            index = rng.randrange(len(PROMPTS))
            params = _params(index)
            match rng.randrange(4):
                case 0:
                    (out,) = llm.generate(PROMPTS[index], params, use_tqdm=False)
                    assert _tokens(out) == alone[index]
                case 1:
                    outputs = llm.generate(
                        [PROMPTS[index], PROMPTS[0]], [params, _params(0)], False
                    )
                    assert [_tokens(out) for out in outputs] == [alone[index], alone[0]]
                case 2:
                    got: list[list[int]] = [[] for _ in range(params.n)]
                    for part in llm.stream(PROMPTS[index], params):
                        got[part["sample"]] += part["token_ids"]
                    assert got == alone[index]
                case 3:
                    stream = llm.stream([PROMPTS[index]] * 2, params)
                    for _ in range(rng.randrange(4)):
                        next(stream, None)
                    stream.close()

    @staticmethod
    def _alone(llm: LLM) -> list[list[list[int]]]:
        return [
            _tokens(llm.generate(prompt, _params(i), use_tqdm=False)[0])
            for i, prompt in enumerate(PROMPTS)
        ]

    def _check(self, llm: LLM, seed: int, count: int) -> None:
        alone = self._alone(llm)
        rngs = [random.Random(100 * seed + i) for i in range(NUM_THREADS)]
        _in_threads([partial(self._mixed, llm, alone, rng, count) for rng in rngs])
        _assert_idle(llm)

    def test_mixed(self, llm: LLM) -> None:
        self._check(llm, 0, 6)

    @pytest.mark.slow
    @DEPTHS
    def test_fifty_mixed_calls_a_hundred_times(self, small: Path, depth: int) -> None:
        with _llm(small, depth) as llm:
            for seed in range(100):
                self._check(llm, seed, 50)

    def test_adding_while_another_steps(self, llm: LLM) -> None:
        alone = self._alone(llm)
        ids: dict[int, int] = {}
        left = threading.Semaphore(0)

        def add(rng: random.Random) -> None:
            for _ in range(10):
                index = rng.randrange(len(PROMPTS))
                ids[llm.add_request(PROMPTS[index], _params(index))] = index
                left.release()

        def step() -> dict[int, list[list[int]]]:
            ended: dict[int, list[list[int]]] = {}
            while len(ended) < 40:
                for out in llm.step():
                    assert out["request_id"] not in ended
                    ended[out["request_id"]] = _tokens(out)
            return ended

        adders = [partial(add, random.Random(i)) for i in range(4)]
        *_, ended = _in_threads([*adders, step])
        assert ended == {request_id: alone[index] for request_id, index in ids.items()}
        _assert_idle(llm)

    def test_two_that_step_share_the_outputs(self, llm: LLM) -> None:
        ids = [llm.add_request(prompt, _params(0)) for prompt in PROMPTS]

        def step() -> list[int]:
            mine = []
            while llm.has_unfinished:
                mine += [out["request_id"] for out in llm.step()]
            return mine

        assert sorted(chain(*_in_threads([step, step, step]))) == ids

    def test_no_step_runs_while_a_thread_reads_its_outputs(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[tuple[int, int]] = []

        def slow(*given: Any) -> dict[str, Any]:
            before = llm.engine.stats.steps
            time.sleep(0.1)
            read.append((before, llm.engine.stats.steps))
            return make_output(*given)

        monkeypatch.setattr("engine.outputs.make_output", slow)
        ended = threading.Event()

        def step() -> None:
            while not ended.is_set():
                llm.step()

        params = [_params(0, max_tokens=n) for n in (1, 2, 3, 4)]
        with ThreadPoolExecutor(2) as pool:
            stepping = [pool.submit(step) for _ in range(2)]
            outputs = llm.generate(PROMPTS[:4], params, use_tqdm=False)
            ended.set()
            for one in stepping:
                one.result(60)
        assert [len(out["token_ids"]) for out in outputs] == [1, 2, 3, 4]
        assert [after for _, after in read] == [before for before, _ in read]

    def test_step_gets_on_beside_a_long_generate(self, llm: LLM) -> None:
        long = _params(0, max_tokens=90)
        request_id = llm.add_request(PROMPTS[0], _params(0, max_tokens=60), stream=True)
        parts: list[dict[str, Any]] = []
        with ThreadPoolExecutor(1) as pool:
            generating = pool.submit(llm.generate, PROMPTS[1:4], long, False)
            while not parts or parts[-1]["finish_reason"] is None:
                parts += llm.step()
            assert not generating.done()
            assert len(generating.result(60)) == 3
        assert {part["request_id"] for part in parts} == {request_id}
        assert sum(len(part["token_ids"]) for part in parts) == 60
        assert len(parts) > 20

    def test_stats_and_aborts_beside_steps(self, llm: LLM) -> None:
        (expected,) = llm.generate(PROMPTS[1], _params(1, max_tokens=60), use_tqdm=False)
        ends = threading.Event()

        def watch() -> None:
            while not ends.is_set():
                assert llm.stats().num_free_blocks <= llm.stats().num_blocks
                llm.cache_stats()
                llm.abort(llm.add_request(PROMPTS[2], _params(0)))

        def generate() -> Any:
            with suppress(AllmosError):
                return llm.generate(PROMPTS[1], _params(1, max_tokens=60), use_tqdm=False)[0]

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            outputs = _in_threads([generate] * 3)
            ends.set()
            watching.result(60)
        assert [out["token_ids"] for out in outputs] == [expected["token_ids"]] * 3
        while llm.has_unfinished:
            llm.step()
        _assert_idle(llm)


class TestTurns:
    """The turn alone, without a model."""

    @staticmethod
    def _thread(call: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        return thread

    @staticmethod
    def _await_waiting(turns: Turns, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(turns._waiting) < count:
            assert time.monotonic() < deadline
            time.sleep(1e-3)

    def _run_in_order(self, turns: Turns, calls: list[Callable[[], None]]) -> None:
        """Each call in a thread of its own. All wait, in their order, until the turn is free."""
        threads = []
        with turns.turn():
            for count, call in enumerate(calls, 2):
                threads.append(self._thread(call))
                self._await_waiting(turns, count)
        for thread in threads:
            thread.join(30)

    def test_a_thread_that_leaves_wakes_one_that_may_step(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("engine.turns._LOOK_SECONDS", -1)  # sleep until woken
        turns = Turns(lambda: None)
        stepped: list[bool] = []

        def step() -> None:
            with turns.until(lambda: False) as mine:
                stepped.append(mine)

        ready = [True]
        with turns.until(lambda: bool(ready)) as mine:  # results to read: no step may begin
            assert not mine
            thread = self._thread(step)
            self._await_waiting(turns, 2)
            time.sleep(0.02)
            assert stepped == []
        thread.join(30)
        assert stepped == [True]

    def test_a_short_call_comes_before_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine.turns._LOOK_SECONDS", -1)
        turns = Turns(lambda: None)
        order: list[str] = []

        def step() -> None:
            with turns.until(lambda: False):
                order.append("step")

        def call() -> None:
            with turns.turn():
                order.append("call")

        self._run_in_order(turns, [step, step, step, call])
        assert order == ["call", "step", "step", "step"]

    def test_a_step_leaves_the_turn_to_a_short_call_that_wakes_up(self) -> None:
        turns = Turns(lambda: None)
        stepped: list[bool] = []

        def step() -> None:
            with turns.until(lambda: False) as mine:
                stepped.append(mine)

        turns._waiting[-1] = _Waiter(None)  # a thread that was woken and does not run yet
        thread = self._thread(step)
        self._await_waiting(turns, 2)
        time.sleep(0.02)
        assert stepped == []
        del turns._waiting[-1]
        thread.join(30)
        assert stepped == [True]

    def test_steps_come_in_the_order_of_their_arrival_and_before_other_waits(self) -> None:
        turns = Turns(lambda: None)
        order: list[str] = []

        def step(name: str) -> None:
            with turns.step():
                order.append(name)

        def wait() -> None:
            with turns.until(lambda: False):
                order.append("until")

        self._run_in_order(turns, [wait, *(partial(step, name) for name in "abc")])
        assert order == ["a", "b", "c", "until"]

    def test_a_call_within_another_leaves_its_thread_waiting(self) -> None:
        """As a signal handler makes one while its thread reads results."""
        turns = Turns(lambda: None)
        stepped: list[bool] = []

        def step() -> None:
            with turns.step():
                stepped.append(True)

        with turns.until(lambda: True) as mine:
            assert not mine
            with turns.turn():
                pass
            thread = self._thread(step)
            self._await_waiting(turns, 2)
            time.sleep(0.02)
            assert stepped == []
        thread.join(30)
        assert stepped == [True]

    def test_no_call_may_come_where_the_engine_cannot_wait(self) -> None:
        turns = Turns(lambda: None)
        told: list[bool] = []

        def done() -> bool:  # called with the lock held, as a signal handler may be
            with pytest.raises(EngineUseError):
                turns.check()
            told.append(True)
            return True

        with turns.until(done):
            pass
        assert told

    @pytest.mark.parametrize("fails", [False, True])
    def test_what_is_due_is_done_before_and_after_a_turn(self, fails: bool) -> None:
        done: list[bool] = []
        turns = Turns(lambda: done.append(True))
        with suppress(ZeroDivisionError), turns.turn():
            assert len(done) == 1
            _ = 1 // (0 if fails else 1)
        assert len(done) == 2

    def test_requests_dropped_during_a_turn_end_with_it(self, llm: LLM) -> None:
        stream = llm.stream(PROMPTS[0], _params(0))
        next(stream)
        with llm.engine.turns.turn():
            stream.close()
            assert llm.engine.has_unfinished
        assert not llm.engine.has_unfinished


class TestEnds:
    @DEPTHS
    def test_closing_ends_the_calls_of_other_threads(self, small: Path, depth: int) -> None:
        llm = _llm(small, depth)
        stream = llm.stream(PROMPTS[0], _params(0, max_tokens=100))
        next(stream)
        started = threading.Barrier(4)

        def generate() -> Any:
            started.wait()
            try:
                return llm.generate(PROMPTS[1], _params(0, max_tokens=90), use_tqdm=False)[0]
            except EngineClosedError as error:
                return error

        def close() -> None:
            started.wait()
            next(stream, None)
            llm.close()

        *outputs, _ = _in_threads([generate, generate, generate, close])
        for out in outputs:
            closed = isinstance(out, EngineClosedError)
            assert closed or out["finish_reason"] in ("abort", "length")
        with pytest.raises(EngineClosedError):
            llm.generate(PROMPTS[0])

    def test_a_failed_step_is_an_error_in_every_thread(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = llm.engine.scheduler.commit
        all_added = threading.Event()

        def fails(*args: Any) -> Any:
            if all_added.is_set():
                raise ZeroDivisionError("planted")
            if llm.engine.stats.unfinished_requests == 4:
                all_added.set()
            return commit(*args)

        monkeypatch.setattr(llm.engine.scheduler, "commit", fails)

        def generate() -> BaseException:
            with pytest.raises((ZeroDivisionError, StepError), match="planted") as caught:
                llm.generate(PROMPTS[0], _params(0, max_tokens=100), use_tqdm=False)
            return caught.value

        def stream() -> BaseException:
            try:
                parts = list(llm.stream(PROMPTS[0], _params(0, max_tokens=100)))
            except ZeroDivisionError as error:
                return error
            assert parts[-1]["finish_reason"] == "error"
            told: BaseException = parts[-1]["error"]
            return told

        errors = _in_threads([generate, generate, stream, stream])
        assert sum(isinstance(error, ZeroDivisionError) for error in errors) == 1
        assert sum(isinstance(error, StepError) for error in errors) == 3
        _assert_idle(llm)
        assert llm.generate(PROMPTS[0], _params(0), use_tqdm=False)[0]["error"] is None

    def test_an_interrupt_ends_the_requests_of_its_thread(self, llm: LLM) -> None:
        """Ctrl-C while another thread steps: the other thread goes on."""
        (expected,) = llm.generate(PROMPTS[1], _params(0, max_tokens=90), use_tqdm=False)
        stream = llm.stream(PROMPTS[1], _params(0, max_tokens=90))
        parts = [next(stream)]
        with pytest.raises(KeyboardInterrupt), llm.engine.turns.until(lambda: True):
            raise KeyboardInterrupt
        parts += stream
        assert [t for part in parts for t in part["token_ids"]] == expected["token_ids"]
        _assert_idle(llm)


_OUTLIVES = """
import sys, threading
from llm import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", pipeline_depth=int(sys.argv[2]), max_model_len=64)
params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
stream = llm.stream([1, 2, 3], params)
next(stream)
def use():
    threading.main_thread().join()
    print(llm.generate([1, 2, 3], params, use_tqdm=False)[0]["token_ids"])
    list(stream)
    next(llm.stream([4, 5], params))  # ends together with the process
threading.Thread(target=use).start()
"""


@DEPTHS
def test_a_thread_may_outlive_the_main_thread(small: Path, depth: int) -> None:
    command = [sys.executable, "-c", _OUTLIVES, str(small), str(depth)]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    with _llm(small, depth) as llm:
        (out,) = llm.generate([1, 2, 3], params, use_tqdm=False)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out['token_ids']}\n"


class TestInterrupts:
    """Ctrl-C at any moment: the turn is free afterwards, for this thread and for others."""

    @staticmethod
    def _interrupted(call: Callable[[], object], seconds: float) -> bool:
        """Call again and again until the signal raises; return whether it did.

        Python drops an exception that a finalizer raises, so the signal comes again.
        """
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 3.0)
            while True:
                call()
        except KeyboardInterrupt:
            return True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @pytest.fixture(autouse=True)
    def _signals(self) -> Iterator[None]:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        yield
        # A signal that nobody handles would end the process.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    @pytest.mark.parametrize("name", ["stats", "generate", "stream"])
    @pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
    def test_the_turn_is_free_afterwards(self, llm: LLM, name: str, count: int) -> None:
        params = _params(0, max_tokens=3)
        calls: dict[str, Callable[[], object]] = {
            "stats": llm.stats,
            "generate": partial(llm.generate, PROMPTS[0], params, use_tqdm=False),
            "stream": lambda: list(llm.stream(PROMPTS[0], params)),
        }
        rng = random.Random(count)
        expected = calls["generate"]()
        for _ in range(count):
            seconds = rng.uniform(5e-5, 4e-4 if name == "stats" else 1e-2)
            assert self._interrupted(calls[name], seconds)
            (stats,) = _in_threads([llm.stats])
            assert stats.num_free_blocks <= stats.num_blocks
            assert llm.stats().unfinished_requests == 0
        _assert_idle(llm)
        again: Any = calls["generate"]()
        assert _tokens(again[0]) == _tokens(expected[0])  # type: ignore[index]

    @pytest.mark.parametrize("num_threads", [0, 2])
    def test_a_signal_handler_may_generate(self, llm: LLM, num_threads: int) -> None:
        """Also while other threads generate, and while the main thread encodes a prompt."""
        params = _params(0, max_tokens=2)
        expected = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]["token_ids"]
        told: list[Any] = []
        ended = threading.Event()

        def call(*_: object) -> None:
            with suppress(EngineUseError):
                told.append(llm.generate(PROMPTS[0], params, use_tqdm=False)[0]["token_ids"])
            signal.setitimer(signal.ITIMER_REAL, 3e-3)

        def beside() -> None:
            while not ended.is_set():
                llm.generate(PROMPTS[1:4], _params(0, max_tokens=9), use_tqdm=False)

        before = signal.signal(signal.SIGALRM, call)
        with ThreadPoolExecutor(max(1, num_threads)) as pool:
            threads = [pool.submit(beside) for _ in range(num_threads)]
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-3)
                deadline = time.monotonic() + 60
                while len(told) < 40 and time.monotonic() < deadline:
                    (out,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
                    assert out["token_ids"] == expected
            finally:
                signal.signal(signal.SIGALRM, signal.SIG_IGN)
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
                ended.set()
            for thread in threads:
                thread.result(60)
        assert told == [expected] * len(told)
        assert len(told) >= 40
        _assert_idle(llm)

    def test_a_tokenizer_may_call_the_engine(self, llm: LLM) -> None:
        class Calling:
            def encode(self, text: str) -> list[int]:
                out = llm.generate([1], _params(0, max_tokens=len(text)), use_tqdm=False)
                return list(out[0]["token_ids"])

        llm.tokenizer = Calling()
        (out,) = llm.generate("four", _params(0, max_tokens=2), use_tqdm=False)
        assert len(out["prompt_token_ids"]) == 4

    def test_a_signal_handler_may_call_the_engine(self, llm: LLM) -> None:
        told: list[object] = []

        def ask(*_: object) -> None:
            try:
                told.append(llm.stats())
            except EngineUseError as error:
                told.append(error)

        before = signal.signal(signal.SIGALRM, ask)
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
        try:
            while len(told) < 200:
                llm.stats()
                llm.generate(PROMPTS[0], _params(0, max_tokens=2), use_tqdm=False)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        _assert_idle(llm)


class TestStreams:
    PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def test_in_turn_each_gets_a_token_a_step(self, small: Path) -> None:
        for depth in (0, 1):
            with _llm(small, depth, max_num_seqs=24) as llm:
                streams = [llm.stream([1 + i, 2], self.PARAMS) for i in range(24)]
                for _ in range(12):
                    sizes = [len(next(stream)["token_ids"]) for stream in streams]
                    assert sizes == [1] * 24

    def test_in_threads_each_gets_a_token_a_step(self, small: Path) -> None:
        for depth in (0, 1):
            with _llm(small, depth, max_num_seqs=8) as llm:
                streams = [llm.stream([1 + i, 2], self.PARAMS) for i in range(8)]
                # All threads ask for the next part before one of them gets the part after that.
                together = threading.Barrier(8)

                def read(stream: Any, together: threading.Barrier) -> list[int]:
                    sizes = []
                    for part in stream:
                        sizes.append(len(part["token_ids"]))
                        together.wait(30)
                    return sizes

                sizes = _in_threads([partial(read, stream, together) for stream in streams])
                assert sizes == [[1] * 12] * 8

    def test_step_returns_the_parts_of_all(self, llm: LLM) -> None:
        expected = llm.generate(PROMPTS[:3], self.PARAMS, use_tqdm=False)
        n = SamplingParams(n=2, temperature=0.8, seed=4, max_tokens=5, ignore_eos=True)
        (pair,) = llm.generate(PROMPTS[3], n, use_tqdm=False)
        ids = [llm.add_request(prompt, self.PARAMS, stream=True) for prompt in PROMPTS[:3]]
        two, plain = llm.add_request(PROMPTS[3], n, stream=True), llm.add_request([5], self.PARAMS)
        got: dict[tuple[int, int], list[int]] = {}
        ends: dict[tuple[int, int], Any] = {}
        whole = []
        while llm.has_unfinished:
            parts = llm.step()
            whole += [out for out in parts if out["request_id"] == plain]
            for part in parts:
                if part["request_id"] == plain:
                    continue
                key = part["request_id"], part["sample"]
                assert key not in ends
                assert len(part["token_ids"]) == 1
                got.setdefault(key, []).extend(part["token_ids"])
                if part["finish_reason"] is not None:
                    ends[key] = part["finish_reason"], part["error"]
        for request_id, out in zip(ids, expected, strict=True):
            assert got[request_id, 0] == out["token_ids"]
        assert [got[two, i] for i in range(2)] == _tokens(pair)
        assert set(ends.values()) == {("length", None)}
        assert len(whole) == 1
        _assert_idle(llm)

    def test_an_aborted_one_tells_its_end(self, llm: LLM) -> None:
        request_id = llm.add_request(PROMPTS[0], self.PARAMS, stream=True)
        llm.step()
        llm.abort(request_id)
        parts = [part for _ in range(3) for part in llm.step()]
        assert parts[-1]["finish_reason"] == "abort"
        _assert_idle(llm)


class _Calls:
    """A processor that calls the engine. It is not copied."""

    def __init__(self, llm: LLM, call: Callable[[LLM], object]) -> None:
        self.llm, self.call, self.errors = llm, call, list[BaseException]()

    def for_request(self, prompt: list[int], sample: int) -> Any:
        return self._process

    def _process(self, token_ids: list[int], logits: Tensor) -> Tensor:
        try:
            self.call(self.llm)
        except BaseException as error:
            self.errors.append(error)
            raise
        return logits


CALLS: dict[str, Callable[[LLM], object]] = {
    "generate": lambda llm: llm.generate([1], use_tqdm=False),
    "stream": lambda llm: llm.stream([1]),
    "chat": lambda llm: llm.chat([{"role": "user", "content": "a"}], use_tqdm=False),
    "add_request": lambda llm: llm.add_request([1]),
    "step": lambda llm: llm.step(),
    "stats": lambda llm: llm.stats(),
    "cache_stats": lambda llm: llm.cache_stats(),
    "reset_prefix_cache": lambda llm: llm.reset_prefix_cache(),
    "close": lambda llm: llm.close(),
}


class TestInsideOfASteps:
    @pytest.mark.parametrize("name", CALLS)
    def test_a_processor_cannot_call_the_engine(self, llm: LLM, name: str) -> None:
        calls = _Calls(llm, CALLS[name])
        params = SamplingParams(temperature=0, max_tokens=3, logits_processors=[calls])
        failed, good = llm.generate(
            [PROMPTS[0], PROMPTS[1]], [params, SamplingParams(temperature=0)], use_tqdm=False
        )
        assert [type(error) for error in calls.errors] == [EngineUseError]
        assert isinstance(failed["error"].__cause__, EngineUseError)
        assert good["error"] is None
        _assert_idle(llm)

    def test_a_policy_cannot_call_the_engine(self, small: Path) -> None:
        made: list[LLM] = []

        class Calling(FirstCome):
            def first(self) -> Any:
                made[0].generate([1], use_tqdm=False)

        with _llm(small, 0, queue_policy=Calling) as llm:
            made.append(llm)
            with pytest.raises(EngineUseError, match="running this function"):
                llm.generate(PROMPTS[0], use_tqdm=False)
            made.clear()


class TestProcesses:
    @staticmethod
    def _told(call: Callable[[], object]) -> str:
        """What a call returned or raised; nothing for an EngineUseError."""
        try:
            return repr(call())
        except EngineUseError:
            return ""
        except BaseException as error:
            return repr(error)

    def _child(self, llm: LLM, streams: list[Any], pipe: Any) -> None:
        calls: dict[str, Callable[[], object]]
        calls = {name: partial(call, llm) for name, call in CALLS.items()}
        calls |= {"abort": partial(llm.abort, 0), "next": partial(next, streams[0])}
        calls |= {"now": llm.now, "wait_until": partial(llm.wait_until, 0.0)}
        calls["has_unfinished"] = lambda: llm.has_unfinished
        told = {name: self._told(call) for name, call in calls.items()}
        calls.clear()
        streams.clear()
        gc.collect()
        with llm:
            pass
        pipe.send(told)

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    @pytest.mark.parametrize("options", [{}, {"tensor_parallel_size": 2}], ids=["one", "ranks"])
    def test_a_forked_child_cannot_use_the_engine(self, small: Path, options: Any) -> None:
        with _llm(small, 1, **options) as llm:
            stream = llm.stream(PROMPTS[0], _params(0, max_tokens=20))
            parts = [next(stream)]
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            child = context.Process(target=self._child, args=(llm, [stream], theirs))
            child.start()
            assert ours.poll(30)
            told = ours.recv()
            child.join(30)
            assert child.exitcode == 0
            assert {name: text for name, text in told.items() if text} == {}
            parts += stream
            tokens = [token for part in parts for token in part["token_ids"]]
            (out,) = llm.generate(PROMPTS[0], _params(0, max_tokens=20), use_tqdm=False)
            assert out["token_ids"] == tokens
            _assert_idle(llm)

    def test_no_copy_and_no_pickle(self, llm: LLM) -> None:
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(EngineUseError, match="copied or pickled"):
                make(llm)
        assert llm.generate([1], use_tqdm=False)


class _Failing:
    """A processor that fails after some calls, and that a weak reference can watch."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    def __init__(self, left: int) -> None:
        self.left = left
        self.alive.add(self)

    def for_request(self, prompt: list[int], sample: int) -> _Failing:
        return _Failing(self.left)

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError
        return logits


def _interleave(llm: LLM, rng: random.Random) -> None:
    """One thread's part of a random interleaving."""
    for _ in range(rng.randint(1, 3)):
        index = rng.randrange(len(PROMPTS))
        more = {"logits_processors": [_Failing(rng.randint(1, 5))]} if rng.random() < 0.4 else {}
        params = _params(index, **more)
        with suppress(StepError):
            match rng.randrange(6):
                case 0:
                    llm.generate(PROMPTS[index], params, use_tqdm=False)
                case 1:
                    request_id = llm.add_request(PROMPTS[index], params, stream=rng.random() < 0.5)
                    for _ in range(rng.randrange(3)):
                        llm.step()
                    if rng.random() < 0.5:
                        llm.abort(request_id)
                case 2:
                    stream = llm.stream([PROMPTS[index]] * 2, params)
                    for _ in range(rng.randrange(4)):
                        next(stream, None)
                    if rng.random() < 0.5:
                        stream.close()
                case 3:
                    list(llm.stream(PROMPTS[index], params))
                case 4:
                    llm.stats()
                    llm.reset_prefix_cache()
                case 5 if rng.random() < 0.2:
                    with llm.engine.turns.turn():
                        llm.engine.reset()


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_random_interleavings_leave_nothing(llm: LLM, count: int) -> None:
    for seed in range(count):
        rngs = [random.Random(4 * seed + i) for i in range(4)]
        _in_threads([partial(_interleave, llm, rng) for rng in rngs])
        while llm.has_unfinished:
            llm.step()
        _assert_idle(llm)
        gc.collect()
        assert not _Failing.alive
    assert llm.generate(PROMPTS[0], _params(0), use_tqdm=False)[0]["error"] is None
