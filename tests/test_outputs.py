"""Outputs as the user gets them: stop strings, several outputs, streams, chats, metrics."""

from __future__ import annotations

import copy
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from engine.outputs import OutputStream, make_output
from llm import LLM, SamplingParams
from tests.checkpoints import random_prompts
from utils.chats import templated
from utils.errors import EngineClosedError, LogitsError, RequestError, RequestTooLongError

DEPTHS = [0, 1]
PROMPTS = ["import os\n", "class Stack:\n", "def main(args):\n    "]
FREE = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


class _UnprintableError(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no name")

    def __call__(self, ids: list[int], logits: Any) -> Any:
        raise self


def _shrunk(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits.resize_(0)


BROKEN: dict[str, Any] = {
    "broadcast": lambda ids, logits: torch.ones(1),
    "complex": lambda ids, logits: logits + 0j,
    "list": lambda ids, logits: logits.tolist(),
    "meta": lambda ids, logits: logits.to("meta"),
    "None": lambda ids, logits: None,
    "numpy": lambda ids, logits: logits.numpy(),
    "shape": lambda ids, logits: logits[None],
    "shrunk": _shrunk,
    "sparse": lambda ids, logits: logits.to_sparse(),
    "unprintable": _UnprintableError(),
}


@pytest.fixture(scope="module", params=DEPTHS, ids=["depth0", "depth1"])
def llm(shipped: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(
        shipped,
        device="cpu",
        max_num_seqs=8,
        max_model_len=256,
        kvcache_block_size=16,
        pipeline_depth=request.param,
    ) as llm:
        yield llm
        assert not llm.has_unfinished
        assert llm.stats().num_free_blocks == llm.stats().num_blocks


@pytest.fixture(scope="module")
def free(llm: LLM) -> list[dict[str, Any]]:
    """What comes without any stop."""
    return [*llm.generate(PROMPTS, FREE, use_tqdm=False)]


def _greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 40, "ignore_eos": True, **values})


def _steps(llm: LLM, outputs: list[dict[str, Any]]) -> None:
    while llm.has_unfinished:
        outputs += llm.step()


class TestStopStrings:
    @pytest.mark.parametrize("start", [0, 1, 9, 30])
    @pytest.mark.parametrize("length", [1, 2, 7])
    def test_anywhere(self, llm: LLM, free: list[dict[str, Any]], start: int, length: int) -> None:
        for prompt, whole in zip(PROMPTS, free, strict=True):
            stop = whole["text"][start : start + length]
            (out,) = llm.generate(prompt, _greedy(stop=stop), use_tqdm=False)
            assert out["text"] == whole["text"][: whole["text"].index(stop)]
            assert out["finish_reason"] == "stop"
            count = len(out["token_ids"])
            assert out["token_ids"] == whole["token_ids"][:count]
            decode = llm.decode
            assert stop in decode(out["token_ids"])
            assert stop not in decode(out["token_ids"][:-1])

    def test_beside_requests_without(self, llm: LLM, free: list[dict[str, Any]]) -> None:
        params = [FREE, _greedy(stop=[free[1]["text"][5:9], "nowhere to be found"]), FREE]
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert [out["text"] for out in outputs[::2]] == [out["text"] for out in free[::2]]
        assert outputs[1]["text"] == free[1]["text"][: free[1]["text"].index(free[1]["text"][5:9])]

    def test_at_the_length_limit(self, llm: LLM, free: list[dict[str, Any]]) -> None:
        text = free[0]["text"]
        (out,) = llm.generate(PROMPTS[0], _greedy(stop=text[3:]), use_tqdm=False)
        assert (out["finish_reason"], out["text"]) == ("stop", text[:3])
        assert out["token_ids"] == free[0]["token_ids"]

    def test_over_two_tokens_and_with_min_tokens(
        self, llm: LLM, free: list[dict[str, Any]]
    ) -> None:
        tokens = free[0]["token_ids"]
        stop = llm.decode(tokens[4:6])
        (out,) = llm.generate(PROMPTS[0], _greedy(stop=stop, min_tokens=5), use_tqdm=False)
        assert out["token_ids"] == tokens[:6]
        (later,) = llm.generate(PROMPTS[0], _greedy(stop=stop, min_tokens=6), use_tqdm=False)
        assert len(later["token_ids"]) > 6

    def test_logprobs_are_as_many_as_tokens(self, llm: LLM, free: list[dict[str, Any]]) -> None:
        stop = free[0]["text"][6:9]
        (out,) = llm.generate(PROMPTS[0], _greedy(stop=stop, logprobs=1), use_tqdm=False)
        assert [next(iter(entry)) for entry in out["logprobs"]] == out["token_ids"]

    def test_stop_token_ids(self, llm: LLM, free: list[dict[str, Any]]) -> None:
        tokens = free[0]["token_ids"]
        (out,) = llm.generate(PROMPTS[0], _greedy(stop_token_ids=[tokens[7]]), use_tqdm=False)
        assert out["token_ids"] == tokens[: tokens.index(tokens[7]) + 1]
        assert out["finish_reason"] == "stop"

    def test_one_by_one(self, llm: LLM, free: list[dict[str, Any]]) -> None:
        stop = free[0]["text"][6:9]
        request_id = llm.add_request(PROMPTS[0], _greedy(stop=stop))
        outputs = []
        while llm.has_unfinished:
            outputs += llm.step()
        (out,) = outputs
        assert out["request_id"] == request_id
        assert out["text"] == free[0]["text"][: free[0]["text"].index(stop)]

    def test_without_a_tokenizer_they_are_refused(self, shipped: Path, tmp_path: Path) -> None:
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(shipped / name, tmp_path)
        with LLM(tmp_path, device="cpu", max_num_seqs=2, max_model_len=64) as llm:
            with pytest.raises(RequestError, match="no tokenizer") as caught:
                llm.generate([[5]], _greedy(stop="x"), use_tqdm=False)
            assert caught.value.field == "stop"
            assert not llm.has_unfinished
            with pytest.raises(RequestError, match="no tokenizer"):
                llm.stream([[5]], _greedy(stop="x"))
            parts = list(llm.stream([[5]], _greedy(max_tokens=3)))
            assert [len(part["token_ids"]) for part in parts] == [1, 1, 1]


class TestSeveralOutputs:
    RANDOM = SamplingParams(temperature=1.0, max_tokens=20, seed=9, ignore_eos=True, n=4)

    def test_differ_are_reproducible_and_share_the_prompt(self, llm: LLM) -> None:
        prompt = random_prompts([50], seed=8, vocab_size=4000)[0]
        llm.reset_prefix_cache()
        before = llm.cache_stats().hit_tokens
        (out,) = llm.generate([prompt], self.RANDOM, use_tqdm=False)
        # Three of four found the prompt's three full blocks of 16.
        assert llm.cache_stats().hit_tokens - before == 3 * 48
        assert [one["metrics"]["cached_prompt_tokens"] for one in out["outputs"]] == [0, 48, 48, 48]
        tokens = [one["token_ids"] for one in out["outputs"]]
        assert len(tokens) == 4
        assert len({tuple(t) for t in tokens}) == 4
        assert (out["text"], out["token_ids"]) == (out["outputs"][0]["text"], tokens[0])
        (again,) = llm.generate([prompt], self.RANDOM, use_tqdm=False)
        assert [one["token_ids"] for one in again["outputs"]] == tokens

    def test_the_first_is_that_of_one(self, llm: LLM) -> None:
        one = SamplingParams(temperature=1.0, max_tokens=20, seed=9, ignore_eos=True)
        (alone,) = llm.generate(PROMPTS[0], one, use_tqdm=False)
        (out,) = llm.generate(PROMPTS[0], self.RANDOM, use_tqdm=False)
        assert out["token_ids"] == alone["token_ids"]
        assert [one["token_ids"] for one in alone["outputs"]] == [alone["token_ids"]]

    def test_without_a_seed_they_differ_too(self, llm: LLM) -> None:
        params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True, n=3)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        for out in outputs:
            assert len({tuple(one["token_ids"]) for one in out["outputs"]}) == 3

    def test_one_by_one_and_aborted_together(self, llm: LLM) -> None:
        request_id = llm.add_request(PROMPTS[0], self.RANDOM)
        llm.step()
        llm.step()
        llm.abort(request_id)
        outputs = []
        while llm.has_unfinished:
            outputs += llm.step()
        (out,) = outputs
        assert out["request_id"] == request_id
        assert [one["finish_reason"] for one in out["outputs"]] == ["abort"] * 4

    def test_prompt_logprobs_are_computed_once(self, llm: LLM) -> None:
        params = SamplingParams(max_tokens=2, n=3, prompt_logprobs=0, ignore_eos=True)
        (out,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
        assert [len(out["outputs"]), len(out["prompt_logprobs"])] == [3, 3]


class TestStreams:
    @pytest.mark.parametrize("n", [1, 2])
    def test_increments_make_the_outputs(self, llm: LLM, n: int) -> None:
        params = [
            SamplingParams(temperature=1.3, seed=1, max_tokens=60, n=n),
            _greedy(stop=["\n    ", "self"], n=n),
            SamplingParams(temperature=2.5, seed=2, max_tokens=30, ignore_eos=True, n=n),
        ]
        expected = llm.generate(PROMPTS, params, use_tqdm=False)
        texts: dict[tuple[int, int], str] = {}
        tokens: dict[tuple[int, int], list[int]] = {}
        reasons: dict[tuple[int, int], list[str]] = {}
        for part in llm.stream(PROMPTS, params):
            where = part["index"], part["sample"]
            texts[where] = texts.get(where, "") + part["text"]
            tokens.setdefault(where, []).extend(part["token_ids"])
            assert part["text"] or part["finish_reason"]
            reasons.setdefault(where, []).append(part["finish_reason"])
        for (index, sample), text in texts.items():
            out = expected[index]
            out = out["outputs"][sample] if n > 1 else out
            assert text == out["text"]
            assert tokens[index, sample] == out["token_ids"]
            assert reasons[index, sample][-1] == out["finish_reason"]
            assert set(reasons[index, sample][:-1]) <= {None}
        assert len(texts) == len(PROMPTS) * n

    def test_the_first_comes_before_the_last_is_computed(self, llm: LLM) -> None:
        stream = llm.stream(PROMPTS[0], FREE)
        first = next(stream)
        assert 0 < len(first["token_ids"]) < 4
        stream.close()

    @pytest.mark.parametrize("num_parts", [0, 1, 5])
    def test_closing_aborts(self, llm: LLM, num_parts: int) -> None:
        aborted = llm.stats().finished_requests
        stream = llm.stream(PROMPTS, FREE)
        for _ in range(num_parts):
            next(stream)
        stream.close()
        assert not llm.has_unfinished
        assert llm.stats().num_free_blocks == llm.stats().num_blocks
        assert llm.stats().finished_requests == aborted + 3
        assert list(stream) == []

    def test_dropping_it_aborts(self, llm: LLM) -> None:
        for _ in llm.stream(PROMPTS, FREE):
            break
        llm.stream(PROMPTS, FREE)
        assert not llm.has_unfinished

    @pytest.mark.parametrize("elsewhere", [False, True])
    @pytest.mark.parametrize("method", ["schedule", "commit", "add"])
    def test_dropping_it_inside_another_call(
        self,
        llm: LLM,
        free: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
        method: str,
        elsewhere: bool,
    ) -> None:
        """As the garbage collector may: in the middle of anything, in any thread."""
        streams = [llm.stream(PROMPTS[1], FREE)]
        next(streams[0])
        scheduler = llm.engine.scheduler
        inner = getattr(scheduler, method)

        def collecting(*args: Any) -> Any:
            while streams:
                if elsewhere:
                    thread = threading.Thread(target=streams.pop().close)
                    thread.start()
                    thread.join()
                else:
                    streams.pop().close()
            return inner(*args)

        monkeypatch.setattr(scheduler, method, collecting)
        (out,) = llm.generate(PROMPTS[2], FREE, use_tqdm=False)
        assert out["text"] == free[2]["text"]
        assert not streams
        assert not llm.has_unfinished
        assert llm.stats().num_free_blocks == llm.stats().num_blocks

    def test_beside_generate_and_another_stream(self, llm: LLM, free: list[dict[str, Any]]) -> None:
        first, second = llm.stream(PROMPTS[0], FREE), llm.stream(PROMPTS[1], FREE)
        texts = [next(first)["text"], next(second)["text"]]
        (out,) = llm.generate(PROMPTS[2], FREE, use_tqdm=False)
        texts[0] += "".join(part["text"] for part in first)
        texts[1] += "".join(part["text"] for part in second)
        assert [*texts, out["text"]] == [out["text"] for out in free]

    def test_mistakes_are_told_at_once(self, llm: LLM) -> None:
        with pytest.raises(RequestError, match="is empty"):
            llm.stream([PROMPTS[0], ""], FREE)
        assert not llm.has_unfinished

    def test_a_failed_request_ends_its_stream_alone(self, llm: LLM) -> None:
        def fails(token_ids: list[int], logits: Any) -> Any:
            return logits if len(token_ids) < 9 else 1 / 0

        (expected,) = llm.generate(PROMPTS[0], FREE, use_tqdm=False)
        params = [FREE, _greedy(logits_processors=[fails])]
        parts: list[list[dict[str, Any]]] = [[], []]
        prompts: list[Any] = [PROMPTS[0], [1, 2, 3, 4]]
        for part in llm.stream(prompts, params):
            parts[part["index"]].append(part)
        good, failed = parts
        assert [t for part in good for t in part["token_ids"]] == expected["token_ids"]
        assert (good[-1]["finish_reason"], good[-1]["error"]) == ("length", None)
        assert sum(len(part["token_ids"]) for part in failed) == 5
        assert failed[-1]["finish_reason"] == "error"
        assert isinstance(failed[-1]["error"], LogitsError)
        assert re.search(r"processor .*fails.* failed: ZeroDivisionError", str(failed[-1]["error"]))
        assert not llm.has_unfinished

    @pytest.mark.parametrize("name", sorted(BROKEN))
    def test_a_broken_processor_ends_its_request_alone(
        self, llm: LLM, free: list[dict[str, Any]], name: str
    ) -> None:
        params = [FREE, _greedy(logits_processors=[BROKEN[name]])]
        good, failed = llm.generate(PROMPTS[:2], params, use_tqdm=False)
        assert good["token_ids"] == free[0]["token_ids"]
        assert failed["finish_reason"] == "error"
        assert isinstance(failed["error"], LogitsError)
        assert re.search(r"processor .* failed: ", str(failed["error"]))

    def test_each_processor_gets_the_logits_of_the_one_before(self, llm: LLM) -> None:
        def only(token_ids: list[int], logits: Any) -> Any:
            left = torch.full_like(logits, float("-inf"))
            left[5] = left[6] = 1.0
            return left

        def more(token_ids: list[int], logits: Any) -> Any:
            return logits + torch.arange(len(logits)) / 100

        for calls, token in (([only, more], 6), ([only, more, lambda ids, x: -x.abs()], 5)):
            params = _greedy(logits_processors=calls, max_tokens=2)
            (out,) = llm.generate([[7, 8]], params, use_tqdm=False)
            assert out["token_ids"] == [token, token]

    def test_each_processor_gets_token_ids_of_its_own(self, llm: LLM) -> None:
        seen: list[list[int]] = []

        def changes(token_ids: list[int], logits: Any) -> Any:
            token_ids.append(5)
            return logits

        def keeps(token_ids: list[int], logits: Any) -> Any:
            seen.append(token_ids)
            return logits

        params = _greedy(logits_processors=[changes, keeps], max_tokens=3)
        (out,) = llm.generate([[7, 8]], params, use_tqdm=False)
        assert seen == [[7, 8, *out["token_ids"][:i]] for i in range(3)]

    @pytest.mark.parametrize("request_id", ["1", None, 1.5, True])
    def test_an_abort_of_what_is_no_request_id(self, llm: LLM, request_id: Any) -> None:
        with pytest.raises(RequestError, match="request_id"):
            llm.abort(request_id)

    def test_step_tells_what_close_has_ended(self, shipped: Path) -> None:
        llm = LLM(shipped, device="cpu", max_num_seqs=2, max_model_len=64)
        request_id = llm.add_request(PROMPTS[0], FREE, stream=True)
        llm.step()
        llm.close()
        (last,) = llm.step()
        assert (last["request_id"], last["finish_reason"]) == (request_id, "abort")
        assert not llm.has_unfinished
        with pytest.raises(EngineClosedError):
            llm.step()

    def test_an_exception_in_step_loses_no_output(
        self, llm: LLM, free: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []

        def fails_once(*given: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return make_output(*given)

        monkeypatch.setattr("engine.outputs.make_output", fails_once)
        ids = [llm.add_request(prompt, FREE) for prompt in PROMPTS]
        streamed = llm.add_request(PROMPTS[0], FREE, stream=True)
        got: list[dict[str, Any]] = []
        with pytest.raises(KeyboardInterrupt):
            _steps(llm, got)
        assert llm.has_unfinished
        _steps(llm, got)
        outputs = {out["request_id"]: out for out in got if "metrics" in out}
        assert [outputs[i]["token_ids"] for i in ids] == [out["token_ids"] for out in free]
        parts = [out for out in got if out["request_id"] == streamed]
        assert [t for part in parts for t in part["token_ids"]] == free[0]["token_ids"]

    def test_a_closed_engine_takes_no_prompts_and_no_empty_list(self, shipped: Path) -> None:
        llm = LLM(shipped, device="cpu", max_num_seqs=2, max_model_len=64)
        llm.close()
        for call in (llm.generate, llm.stream):
            for prompts in ([], PROMPTS):
                with pytest.raises(EngineClosedError):
                    call(prompts, FREE)

    def test_parts_are_taken_before_the_turn_ends(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Otherwise another thread's step could change what a part has."""
        owned: list[bool] = []
        take = OutputStream.take

        def watched(stream: OutputStream) -> Any:
            owned.append(llm.engine.turns._owner == threading.get_ident())
            return take(stream)

        monkeypatch.setattr(OutputStream, "take", watched)
        parts = list(llm.stream(PROMPTS[0], FREE))
        assert len(owned) >= len(parts) > 3
        assert all(owned)

    def test_an_end_that_may_begin_a_stop_string_is_told(
        self, llm: LLM, free: list[dict[str, Any]]
    ) -> None:
        stop = free[0]["text"][-3:] + "ZZ"
        text = "".join(part["text"] for part in llm.stream(PROMPTS[0], _greedy(stop=stop)))
        assert text == free[0]["text"]

    def test_closing_the_engine_first(self, shipped: Path) -> None:
        with LLM(shipped, device="cpu", max_num_seqs=2, max_model_len=64) as llm:
            stream = llm.stream(PROMPTS[0], FREE)
            next(stream)
        (last,) = stream
        assert last["finish_reason"] == "abort"
        with pytest.raises(EngineClosedError):
            llm.stream(PROMPTS[0], FREE)


class TestAllOrNone:
    def test_a_request_that_is_too_long_ends_no_other(self, shipped: Path) -> None:
        options = {"num_kvcache_blocks": 4, "kvcache_block_size": 16, "max_model_len": 256}
        with LLM(shipped, device="cpu", max_num_seqs=2, **options) as llm:
            (expected,) = llm.generate(PROMPTS[0], _greedy(max_tokens=8), use_tqdm=False)
            llm.add_request(PROMPTS[0], _greedy(max_tokens=8))
            assert llm.step() == []
            with pytest.raises(RequestTooLongError, match="KV blocks"):
                llm.add_request([5] * 60, _greedy(max_tokens=60))
            assert llm.stats().unfinished_requests == 1
            outputs: list[dict[str, Any]] = []
            _steps(llm, outputs)
            assert [out["token_ids"] for out in outputs] == [expected["token_ids"]]
            assert outputs[0]["finish_reason"] == "length"
            assert llm.stats().unfinished_requests == 0

    def test_an_error_ends_all_requests_of_the_block(self, llm: LLM) -> None:
        engine = llm.engine
        before = engine.add_request([1, 2], FREE)
        with suppress(ZeroDivisionError), engine.turns.turn(), engine.all_or_none():
            for _ in range(3):
                engine.add_request([1, 2], FREE)
            _ = 1 // 0
        assert engine.stats.unfinished_requests == 1
        with engine.turns.turn():
            engine.drop([before])
        assert engine.stats.unfinished_requests == 0

    def test_a_request_that_had_ended_keeps_its_reason(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if the step that ended it fails afterwards."""
        forget = llm.engine._forget
        calls: list[int] = []

        def fails(seqs: list[Any]) -> None:
            calls.append(len(seqs))
            if sum(calls) == 1 and seqs:
                monkeypatch.setattr(llm.engine, "_forget", forget)
                raise ZeroDivisionError
            forget(seqs)

        monkeypatch.setattr(llm.engine, "_forget", fails)
        ids = [llm.add_request(PROMPTS[0], _greedy(max_tokens=n)) for n in (2, 30)]
        with suppress(ZeroDivisionError):
            while llm.has_unfinished:
                assert llm.step() == []
        outputs = {out["request_id"]: out for out in llm.step()}
        assert [outputs[i]["finish_reason"] for i in ids] == ["length", "error"]
        assert (len(outputs[ids[0]]["token_ids"]), outputs[ids[0]]["error"]) == (2, None)


class TestChats:
    MESSAGES: ClassVar = [{"role": "user", "content": "Write a function."}]

    def test_through_the_checkpoints_template(self, llm: LLM) -> None:
        prompt = "<|im_start|>user\nWrite a function.<|im_end|>\n<|im_start|>assistant\n"
        (expected,) = llm.generate(prompt, FREE, use_tqdm=False)
        (out,) = llm.chat(self.MESSAGES, FREE, use_tqdm=False)
        assert out["token_ids"] == expected["token_ids"]
        assert out["prompt_token_ids"] == expected["prompt_token_ids"]
        assert len(llm.chat([self.MESSAGES] * 2, FREE, use_tqdm=False)) == 2
        both: Any = (self.MESSAGES, self.MESSAGES)
        assert len(llm.chat(both, FREE, use_tqdm=False)) == 2

    @pytest.mark.parametrize(
        "messages", [[{"content": "x"}], ["x"], "x", 5, None, [{"role": "user"}]], ids=str
    )
    def test_messages_that_are_none(self, llm: LLM, messages: Any) -> None:
        with pytest.raises(RequestError) as caught:
            llm.chat(messages, FREE, use_tqdm=False)
        assert caught.value.field == "messages"

    def test_a_template_alone_sets_special_tokens(self, llm: LLM) -> None:
        """The tokenizer would add a token at the beginning of other prompts."""
        tokenizer: Any = copy.deepcopy(llm.tokenizer)
        expected = templated(tokenizer, self.MESSAGES)
        single = TemplateProcessing(
            single="<|im_start|>:0 $A:0", special_tokens=[("<|im_start|>", 1)]
        )
        tokenizer.backend_tokenizer.post_processor = single
        assert tokenizer.encode("x")[0] == 1
        assert templated(tokenizer, self.MESSAGES) == expected

    def test_errors_are_raised_if_asked(self, llm: LLM) -> None:
        def fails(token_ids: list[int], logits: Any) -> Any:
            raise ZeroDivisionError

        params = _greedy(logits_processors=[fails])
        (out,) = llm.chat(self.MESSAGES, params, use_tqdm=False)
        assert isinstance(out["error"], LogitsError)
        with pytest.raises(LogitsError):
            llm.chat(self.MESSAGES, params, use_tqdm=False, raise_errors=True)

    def test_a_checkpoint_without_a_template(self, shipped: Path, tmp_path: Path) -> None:
        path = shutil.copytree(shipped, tmp_path / "model")
        (path / "chat_template.jinja").unlink()
        with (
            LLM(path, device="cpu", max_num_seqs=1, max_model_len=64) as llm,
            pytest.raises(RequestError, match="no chat template"),
        ):
            llm.chat(self.MESSAGES, FREE, use_tqdm=False)


class TestNumbers:
    def test_metrics(self, llm: LLM) -> None:
        outputs = llm.generate(PROMPTS, FREE, use_tqdm=False)
        for out in outputs:
            metrics = out["metrics"]
            assert 0 <= metrics["queue_time"] <= metrics["time_to_first_token"]
            mean, p99 = metrics["mean_inter_token_time"], metrics["p99_inter_token_time"]
            assert 0 < mean <= p99 * 1.0001
            # Of 39 times between 40 tokens the 39th is both.
            assert metrics["longest_inter_token_time"] == p99
            assert metrics["preemptions"] == 0
        (out,) = llm.generate(PROMPTS[0], _greedy(max_tokens=1), use_tqdm=False)
        assert out["metrics"]["mean_inter_token_time"] is None
        assert out["metrics"]["longest_inter_token_time"] is None

    def test_waiting_counts_as_queueing(self, shipped: Path) -> None:
        with LLM(shipped, device="cpu", max_num_seqs=1, max_model_len=128) as llm:
            first, second = llm.generate(PROMPTS[:2], FREE, use_tqdm=False)
        served = first["metrics"]["time_to_first_token"] - first["metrics"]["queue_time"]
        assert second["metrics"]["queue_time"] > 39 * first["metrics"]["mean_inter_token_time"]
        assert second["metrics"]["queue_time"] > served

    def test_stats(self, shipped: Path) -> None:
        with LLM(shipped, device="cpu", max_num_seqs=2, max_model_len=128) as llm:
            outputs = llm.generate(PROMPTS, FREE, use_tqdm=False)
            llm.add_request(PROMPTS[0], FREE)
            llm.step()
            stats = llm.stats()
            assert stats.finished_requests == 3
            assert stats.unfinished_requests == 1
            assert stats.output_tokens == 3 * 40
            assert stats.prompt_tokens == sum(len(out["prompt_token_ids"]) for out in outputs)
            assert stats.steps >= 81
            assert stats.num_free_blocks == stats.num_blocks - 1
            assert stats.cache == llm.cache_stats()


def test_defaults_of_the_checkpoint(llm: LLM, shipped: Path, tmp_path: Path) -> None:
    assert llm.default_sampling_params(max_tokens=3) == SamplingParams(max_tokens=3)
    asked = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "max_new_tokens": 7,
        "eos_token_id": 2,
        "repetition_penalty": None,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(asked))
    found = SamplingParams.from_generation_config(tmp_path, top_k=5)
    assert found == SamplingParams(temperature=0.6, top_k=5, top_p=0.95, max_tokens=7)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    assert SamplingParams.from_generation_config(tmp_path) == SamplingParams(temperature=0)
