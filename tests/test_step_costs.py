"""What a step does grows with the requests that got tokens, not with those that wait."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from engine.outputs import OutputStream, PromptRequests
from engine.requests import Sequence
from engine.scheduler import StaticScheduler
from engine.turns import Turns, _Waiter
from llm import LLM, SamplingParams
from tests.custom_parts import OneAtATime
from tests.utils.test_text import Counted
from utils.prompts import TokenizedPrompt
from utils.stop_strings import StopStrings
from utils.text import Decoder
from utils.text_reader import TextReader

ROOT = Path(__file__).parents[1]
NUM_RUNNING, NUM_WAITING = 4, 200
SCHEDULERS = pytest.mark.parametrize("scheduler", ["continuous", StaticScheduler, OneAtATime])
DEPTHS = pytest.mark.parametrize("depth", [0, 1])


def _llm(path: Path, **options: Any) -> LLM:
    defaults = {"model_runner": "simulated", "pipeline_depth": 0, "max_num_seqs": NUM_RUNNING}
    return LLM(path, num_kvcache_blocks=64, max_model_len=512, **{**defaults, **options})


def _params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 40, "ignore_eos": True, "stop": ("zz\x7f",), **values})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often texts are read, and streams looked at and taken."""
    counts = dict.fromkeys(("read", "ready", "take"), 0)

    def count(kind: type, name: str) -> None:
        method = getattr(kind, name)

        def counted(self: Any, *args: Any, **options: Any) -> Any:
            counts[name] += 1
            return method(self, *args, **options)

        monkeypatch.setattr(kind, name, counted)

    count(TextReader, "read")
    count(OutputStream, "ready")
    count(OutputStream, "take")
    return counts


class TestWaitingRequests:
    @SCHEDULERS
    @DEPTHS
    def test_are_not_read(
        self, shipped: Path, calls: dict[str, int], scheduler: Any, depth: int
    ) -> None:
        with _llm(shipped, scheduler=scheduler, pipeline_depth=depth) as llm:
            for _ in range(NUM_RUNNING + NUM_WAITING):
                llm.add_request([5, 6, 7], _params())
            for _ in range(100):
                before = calls["read"]
                llm.step()
                assert calls["read"] - before <= NUM_RUNNING
            assert calls["read"] > 90

    @DEPTHS
    def test_open_streams_of_step_are_not_looked_at(
        self, shipped: Path, calls: dict[str, int], depth: int
    ) -> None:
        with _llm(shipped, pipeline_depth=depth) as llm:
            for _ in range(NUM_RUNNING + NUM_WAITING):
                llm.add_request([5, 6, 7], _params(), stream=True)
            llm.step()  # the first one looks at all
            before = dict(calls)
            parts = [part for _ in range(50) for part in llm.step()]
            assert calls["take"] - before["take"] <= 50 * NUM_RUNNING
            # When it is told of (at its end twice), before it is taken, and afterwards.
            assert calls["ready"] - before["ready"] <= 4 * 50 * NUM_RUNNING
            assert len(parts) > 100

    @DEPTHS
    def test_outputs_of_a_stream_are_not_looked_at(
        self, shipped: Path, calls: dict[str, int], depth: int
    ) -> None:
        with _llm(shipped, pipeline_depth=depth) as llm:
            stream = llm.stream([[5, 6, 7]] * 102, _params(n=2))
            next(stream)
            before, steps = dict(calls), llm.stats().steps
            for _ in range(150):
                next(stream)
            steps = llm.stats().steps - steps
            assert calls["take"] - before["take"] <= (steps + 1) * NUM_RUNNING
            assert calls["ready"] - before["ready"] <= 4 * (steps + 1) * NUM_RUNNING
            stream.close()

    def test_streams_of_others_are_told_of_once(self, shipped: Path) -> None:
        """A stream that nobody reads costs the others one entry, however many steps they run."""
        with _llm(shipped) as llm:
            llm.add_request([5, 6, 7], _params(), stream=True)
            idle = llm.stream([[5, 6, 7]], _params())
            llm.generate([[8, 9]], _params(max_tokens=30), use_tqdm=False)
            assert len(llm._news) == 1
            assert sum(len(part["token_ids"]) for part in llm.step()) > 25
            assert sum(len(part["token_ids"]) for part in idle) == 40


class TestEnds:
    """Requests that end without a token of their own are read to their end, and then forgotten."""

    @pytest.mark.parametrize("scheduler", ["continuous", StaticScheduler])
    @DEPTHS
    def test_aborted_while_it_waits_or_runs(
        self, shipped: Path, scheduler: Any, depth: int
    ) -> None:
        with _llm(shipped, scheduler=scheduler, pipeline_depth=depth, max_num_seqs=1) as llm:
            ids = [llm.add_request([5, 6, 7], _params(), stream=True) for _ in range(3)]
            parts = [part for _ in range(4) for part in llm.step()]
            for one in ids[:2]:
                llm.abort(one)
            while llm.has_unfinished:
                parts += llm.step()
            ends = {p["request_id"]: p["finish_reason"] for p in parts if p["finish_reason"]}
            assert ends == dict(zip(ids, ["abort", "abort", "length"], strict=True))
            assert llm.engine._read == {}
            assert not llm._queue._streams

    def test_without_any_token(self, shipped: Path) -> None:
        """The last chunk of a prompt whose length limit is the prompt samples no token."""
        with _llm(shipped) as llm:
            reader = TextReader(llm.decode)
            seq = llm.engine.add_request([5, 6, 7], _params(stop=()), reader)
            seq.max_total_tokens = 3
            while llm.engine.has_unfinished:
                llm.engine.step()
            assert (seq.finish_reason, llm.engine._read) == ("length", {})

    @DEPTHS
    def test_a_reset_beside_new_requests(self, shipped: Path, depth: int) -> None:
        """The next step commits one of a new request, and tells of those that the reset ended."""
        with _llm(shipped, pipeline_depth=depth) as llm:
            old = llm.add_request([5, 6, 7], _params(), stream=True)
            whole = llm.add_request([5, 6, 7], _params())
            for _ in range(3):
                llm.step()
            with llm.engine.turns.turn():
                llm.engine.reset()
            new = llm.add_request([5, 6, 7], _params(), stream=True)
            parts = llm.step()
            assert new in {part["request_id"] for part in parts}
            ends = {p["request_id"]: p["finish_reason"] for p in parts if p["finish_reason"]}
            assert ends == {old: "abort", whole: "abort"}

    def test_an_interrupt_between_a_step_and_its_telling(
        self, shipped: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with _llm(shipped) as llm:
            old = llm.add_request([5, 6, 7], _params(max_tokens=3), stream=True)
            llm.add_request([5, 6, 7], _params())
            for _ in range(2):
                llm.step()
            with monkeypatch.context() as patched:
                patched.setattr(llm._queue, "tell", _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    llm.step()
            (*_, last) = [part for part in llm.step() if part["request_id"] == old]
            assert last["finish_reason"] == "length"

    def test_a_close_while_a_part_is_taken(
        self, shipped: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`close` in another thread may end a request whose part was taken a moment before."""
        llm = _llm(shipped)
        stream = llm.stream([[5, 6, 7]], _params())
        take = OutputStream.take

        def closed(self: OutputStream) -> dict[str, Any] | None:
            part = take(self)
            closing = threading.Thread(target=llm.close)
            closing.start()
            closing.join()
            return part

        with monkeypatch.context() as patched:
            # `step` brings the stream's token. So the stream takes its part without the turn.
            llm.add_request([5, 6, 7], _params())
            llm.step()
            patched.setattr(OutputStream, "take", closed)
            assert next(stream)["finish_reason"] is None
        assert [part["finish_reason"] for part in stream] == ["abort"]


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def _group(seqs: list[Sequence], decode: Decoder | None = None) -> PromptRequests:
    prompt = TokenizedPrompt([5, 6, 7], None)
    return PromptRequests(0, seqs, deque(), decode or Decoder(str), prompt)


class TestSharedWork:
    def test_stop_strings_of_a_call_are_compiled_once(
        self, shipped: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[tuple[str, ...]] = []
        make = StopStrings.__init__

        def counted(self: StopStrings, stop: tuple[str, ...], specials: Any) -> None:
            made.append(stop)
            make(self, stop, specials)

        monkeypatch.setattr(StopStrings, "__init__", counted)
        with _llm(shipped) as llm:
            named = {"stop": ("q", "r"), "skip_special_tokens": False}
            kinds: list[dict[str, Any]] = [{"n": 3}, {"n": 2, "stop": ["q", "r"]}, named]
            params = [_params(max_tokens=2, **kind) for _ in range(4) for kind in kinds]
            outputs = llm.generate([[5], [6], [7]] * 4, params, use_tqdm=False)
            assert [len(out["outputs"]) for out in outputs] == [3, 2, 1] * 4
            assert made == [("zz\x7f",), ("q", "r"), ("q", "r")]
            assert len(llm._stops._known) == 0

    def test_a_group_looks_at_each_output_about_once(self) -> None:
        seqs = [Sequence(i, [1], SamplingParams(), max_total_tokens=9) for i in range(3000)]
        looks = 0

        class Looked(list[Sequence]):
            def __getitem__(self, at: Any) -> Any:
                nonlocal looks
                looks += 1
                return super().__getitem__(at)

        group = _group(Looked(seqs))
        for count, seq in enumerate(seqs, 1):
            seq.finish_reason = "length"
            assert group.all_ended() == (count == len(seqs))
        assert looks <= 2 * len(seqs)

    def test_a_part_copies_its_own_tokens(self, shipped: Path) -> None:
        """Not those of earlier parts. Tokens whose text is held back are copied once."""
        with _llm(shipped) as llm:
            text = llm.decode([300] * 400)
            (out,) = llm.generate([[5, 6, 7]], _params(stop=(), max_tokens=300), use_tqdm=False)
            params = _params(logprobs=0, logprobs_details=True)
            seq = Sequence(0, [5, 6, 7], params, max_total_tokens=400)
            for stop in ((), (text + "Q",)):
                seq.text = TextReader(llm.decode, stop, prompt=[5, 6, 7])
                stream = OutputStream(seq, _group([seq], llm.decode), {})
                seq.token_ids, seq.logprobs, told = Counted([5, 6, 7]), [], 0
                for token in out["token_ids"] if not stop else [300] * 300:
                    seq.token_ids.append(token)
                    seq.logprobs.append({token: -1.0})
                    seq.text.read(seq.token_ids, ended=False, start=3)
                    part = stream.take()
                    told += len(part["token_ids"]) if part else 0
                    assert part is None or len(part.logprobs) == len(part.token_ids)
                    assert part is None or part.cumulative_logprob == -told
                assert told > 250 if not stop else told == 0
                assert seq.token_ids.read == 300 + told


class _Lines:
    """Counts the lines that run in the files in which a call and its steps are."""

    FILES = ("llm.py", "engine/outputs.py", "engine/prompt_queue.py", "engine/llm_engine.py")

    def __init__(self) -> None:
        self._files = {str(ROOT / name) for name in self.FILES}
        self.count = 0

    def __enter__(self) -> _Lines:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        self.count += event == "line"
        return self._line


def _generate(llm: LLM, count: int, **values: Any) -> None:
    llm.generate([[5, 6, 7]] * count, _params(max_tokens=3, **values), use_tqdm=False)


def _stream(llm: LLM, count: int) -> None:
    list(llm.stream([[5, 6, 7]] * count, _params(max_tokens=3)))


def _stream_outputs(llm: LLM, count: int) -> None:
    list(llm.stream([[5, 6, 7]], _params(max_tokens=3, n=count)))


def _one_by_one(llm: LLM, count: int) -> None:
    for i in range(count):
        llm.add_request([5, 6, 7], _params(max_tokens=3), stream=i % 2 == 0)
    while llm.has_unfinished:
        llm.step()


CALLS: dict[str, Callable[[LLM, int], None]] = {
    "prompts": _generate,
    "outputs": lambda llm, count: _generate(llm, 1, n=count),
    "streamed prompts": _stream,
    "streamed outputs": _stream_outputs,
    "requests one by one": _one_by_one,
}


@pytest.fixture(scope="module")
def llm(shipped: Path) -> Iterator[LLM]:
    with _llm(shipped) as llm:
        yield llm


@pytest.mark.parametrize("name", CALLS)
def test_the_work_of_a_call_is_linear(llm: LLM, name: str) -> None:
    work = []
    for count in (100, 400):
        with _Lines() as lines:
            CALLS[name](llm, count)
        work.append(lines.count)
    assert work[0] > 100
    assert work[1] < 4.2 * work[0]


class TestTurns:
    def test_a_thread_that_leaves_asks_few_others(self) -> None:
        """All threads leave after a step. If each asked all others, a step would cost a square."""
        turns, asked = Turns(lambda: None), 0

        def done() -> bool:
            nonlocal asked
            asked += 1
            return True

        for i in range(100):
            turns._waiting[-1 - i] = _Waiter(done)
        with turns.until(lambda: True) as mine:
            assert not mine
        assert asked <= 2
