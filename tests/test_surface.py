"""What `LLM` takes and returns beyond tokens: reasons, scores, texts, options, defaults."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from config import PRESETS, Config
from engine.outputs import added_logprobs
from llm import LLM, Logprob, Output, SamplingParams
from tests.checkpoints import random_prompts
from utils.errors import CheckpointError, CheckpointNotFoundError, ConfigError, RequestError

PROMPTS = ["import os\n", "class Stack:\n", "def main(args):\n    "]
EOS = 2  # <|im_end|>
NAME = "<|im_end|>"


@pytest.fixture(scope="module", params=[0, 1], ids=["depth0", "depth1"])
def llm(shipped: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    options: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": 256, "kvcache_block_size": 16}
    with LLM(shipped, device="cpu", pipeline_depth=request.param, **options) as llm:
        yield llm
        assert not llm.has_unfinished
        assert llm.stats().num_free_blocks == llm.stats().num_blocks


def _greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 30, "ignore_eos": True, **values})


def _generate(llm: LLM, prompts: Any, params: SamplingParams | None) -> list[Output]:
    return llm.generate(prompts, params, use_tqdm=False)


def _streamed(llm: LLM, prompts: Any, params: SamplingParams) -> dict[int, list[Output]]:
    parts: dict[int, list[Output]] = {}
    for part in llm.stream(prompts, params):
        parts.setdefault(part.index, []).append(part)
    return parts


def _forced(*tokens: int) -> Any:
    """A logits processor that allows these tokens alone, one after the other."""

    class Forced:
        def for_request(self, prompt_token_ids: list[int], sample: int) -> Any:
            start = len(prompt_token_ids)

            def force(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
                allowed = torch.full_like(logits, -math.inf)
                allowed[tokens[(len(token_ids) - start) % len(tokens)]] = 0
                return allowed

            return force

    return [Forced()]


class TestOutputs:
    def test_one_and_several_have_the_same_shape(self, llm: LLM) -> None:
        (one,) = _generate(llm, PROMPTS[0], _greedy(logprobs=1))
        (two,) = _generate(llm, PROMPTS[0], _greedy(logprobs=1, n=2))
        for out, n in ((one, 1), (two, 2)):
            assert type(out) is type(out.outputs[0]) is type(out.metrics) is Output
            assert [each.index for each in out.outputs] == list(range(n))
            assert "index" not in out
            shared = set(out.outputs[0]) - {"index"}
            assert all(out[key] == out.outputs[0][key] for key in shared)
            assert set(out) - shared == {
                *("request_id", "prompt", "prompt_token_ids", "prompt_logprobs"),
                *("finished", "outputs"),
            }
            assert (out.prompt, out.finished) == (PROMPTS[0], True)
        assert [each.text for each in two.outputs] == [one.text] * 2

    def test_they_can_be_stored(self, llm: LLM) -> None:
        (out,) = _generate(llm, PROMPTS[0], _greedy(logprobs=1, n=2))
        assert pickle.loads(pickle.dumps(out)) == copy.deepcopy(out) == out
        text = json.loads(json.dumps(out))
        assert text["outputs"][1]["text"] == out.text
        assert type(pickle.loads(pickle.dumps(out)).outputs[1]) is Output

    def test_the_prompt(self, llm: LLM) -> None:
        asked = [PROMPTS[0], [5, 6], {"prompt": "anything", "prompt_token_ids": [7, 8]}]
        outputs = _generate(llm, asked, _greedy(max_tokens=1))
        assert [out.prompt for out in outputs] == [PROMPTS[0], None, "anything"]
        assert [out.prompt_token_ids for out in outputs[1:]] == [[5, 6], [7, 8]]
        (chat,) = llm.chat([{"role": "user", "content": "Hi"}], _greedy(max_tokens=1), False)
        assert chat.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    def test_requests_have_ids_in_every_way(self, llm: LLM) -> None:
        outputs = _generate(llm, PROMPTS, _greedy(max_tokens=1))
        assert len({out.request_id for out in outputs}) == 3
        request_id = llm.add_request({"prompt": PROMPTS[0]}, _greedy(max_tokens=2))
        streamed = llm.add_request(np.array([5, 6]), _greedy(max_tokens=2), stream=True)
        told: list[Output] = []
        while llm.has_unfinished:
            told += llm.step()
        assert {out.request_id for out in told} == {request_id, streamed}
        (whole,) = [out for out in told if out.request_id == request_id]
        assert (whole.finished, whole.prompt, len(whole.outputs)) == (True, PROMPTS[0], 1)


class TestStopReasons:
    def test_the_stop_string_that_came_first(self, llm: LLM) -> None:
        (free,) = _generate(llm, PROMPTS[0], _greedy())
        early, late = free.text[3:6], free.text[20:24]
        for stop in ([early, late], [late, early], ["nowhere", early, early + "?"]):
            (out,) = _generate(llm, PROMPTS[0], _greedy(stop=stop, n=2))
            assert (out.finish_reason, out.stop_reason) == ("stop", early)
            assert [one.stop_reason for one in out.outputs] == [early, early]
            last = _streamed(llm, PROMPTS[0], _greedy(stop=stop))[0][-1]
            assert (last.finish_reason, last.stop_reason) == ("stop", early)

    def test_of_two_that_end_in_one_token_the_one_that_begins_first(self, llm: LLM) -> None:
        tokenizer: Any = llm.tokenizer
        (token,) = tokenizer.encode(" return")
        params = _greedy(stop=["turn", "retu", "etur"], logits_processors=_forced(token))
        (out,) = _generate(llm, PROMPTS[0], params)
        assert (out.text, out.stop_reason, len(out.token_ids)) == (" ", "retu", 1)

    def test_token_ids(self, llm: LLM) -> None:
        (free,) = _generate(llm, PROMPTS[0], _greedy())
        token = free.token_ids[7]
        (out,) = _generate(llm, PROMPTS[0], _greedy(stop_token_ids=[4000, token]))
        assert (out.finish_reason, out.stop_reason) == ("stop", token)

    def test_ends_of_sequence_and_lengths_are_no_reason(self, llm: LLM) -> None:
        params = _greedy(logits_processors=_forced(5, 6, EOS), ignore_eos=False)
        (out,) = _generate(llm, PROMPTS[0], params)
        assert (out.finish_reason, out.stop_reason, out.token_ids) == ("stop", None, [5, 6, EOS])
        (out,) = _generate(llm, PROMPTS[0], _greedy(stop=["nowhere"]))
        assert (out.finish_reason, out.stop_reason) == ("length", None)
        request_id = llm.add_request(PROMPTS[0], _greedy(stop=["nowhere"]))
        llm.step()
        llm.abort(request_id)
        told: list[Output] = []
        while llm.has_unfinished:
            told += llm.step()
        assert [(out.finish_reason, out.stop_reason) for out in told] == [("abort", None)]

    @pytest.mark.parametrize("start", [0, 4, 20])
    def test_the_stop_string_in_the_text(self, llm: LLM, start: int) -> None:
        (free,) = _generate(llm, PROMPTS[0], _greedy())
        stop = free.text[start : start + 5]
        (out,) = _generate(llm, PROMPTS[0], _greedy(stop=stop))
        params = _greedy(stop=stop, include_stop_str_in_output=True)
        (whole,) = _generate(llm, PROMPTS[0], params)
        assert whole.text == free.text[: free.text.index(stop) + 5] == out.text + stop
        assert whole.token_ids == out.token_ids
        parts = _streamed(llm, PROMPTS[0], params)[0]
        assert "".join(part.text for part in parts) == whole.text

    def test_the_name_of_a_special_token_in_the_text(self, llm: LLM) -> None:
        values: dict[str, Any] = {"stop": NAME, "logits_processors": _forced(5, 6, EOS, 7)}
        (out,) = _generate(llm, PROMPTS[0], _greedy(**values))
        assert (out.stop_reason, out.token_ids) == (NAME, [5, 6, EOS])
        (whole,) = _generate(llm, PROMPTS[0], _greedy(**values, include_stop_str_in_output=True))
        assert whole.text == out.text + NAME


class TestTexts:
    @pytest.mark.parametrize("stop", [(), ("nowhere",)], ids=str)
    def test_special_tokens(self, llm: LLM, stop: tuple[str, ...]) -> None:
        tokens = [5, EOS, 300, 1, 0, 301, 302]
        tokenizer: Any = llm.tokenizer
        values = {"logits_processors": _forced(*tokens), "max_tokens": len(tokens), "stop": stop}
        (out,) = _generate(llm, PROMPTS[0], _greedy(**values, skip_special_tokens=False))
        assert out.token_ids == tokens
        assert out.text == tokenizer.decode(tokens, skip_special_tokens=False)
        assert NAME in out.text
        (plain,) = _generate(llm, PROMPTS[0], _greedy(**values))
        assert plain.text == tokenizer.decode(tokens, skip_special_tokens=True)
        parts = _streamed(llm, PROMPTS[0], _greedy(**values, skip_special_tokens=False))[0]
        assert "".join(part.text for part in parts) == out.text
        assert len(parts) > 3

    def test_a_stop_string_across_a_special_token(self, llm: LLM) -> None:
        tokens = [300, EOS, 301, 302]
        tokenizer: Any = llm.tokenizer
        text = tokenizer.decode(tokens)
        at = text.index(NAME)
        stop = text[at - 1 : at + len(NAME) + 1]
        params = _greedy(logits_processors=_forced(*tokens), stop=stop, skip_special_tokens=False)
        (out,) = _generate(llm, PROMPTS[0], params)
        assert (out.stop_reason, out.text) == (stop, text[: at - 1])
        assert out.token_ids == tokens[:3]

    def test_none(self, llm: LLM) -> None:
        (free,) = _generate(llm, PROMPTS[0], _greedy())
        params = _greedy(detokenize=False, logprobs=0, logprobs_details=True)
        (out,) = _generate(llm, PROMPTS[0], params)
        assert (out.text, out.token_ids) == ("", free.token_ids)
        assert {one.decoded_token for entry in out.logprobs for one in entry.values()} == {None}
        parts = _streamed(llm, PROMPTS[0], params)[0]
        assert {part.text for part in parts} == {""}
        # Without text, each token is told when it comes.
        assert [len(part.token_ids) for part in parts] == [1] * 30
        with pytest.raises(RequestError, match="detokenize=False") as caught:
            _greedy(detokenize=False, stop="x")
        assert caught.value.field == "stop"


class TestNothingGenerated:
    """max_tokens=0: the prompt is computed, and no token is drawn."""

    def test_the_output_is_empty(self, llm: LLM) -> None:
        params = _greedy(max_tokens=0, logprobs=2, prompt_logprobs=2)
        (out,) = _generate(llm, PROMPTS[0], params)
        assert (out.text, out.token_ids, out.logprobs) == ("", [], [])
        assert (out.finish_reason, out.stop_reason, out.cumulative_logprob) == ("length", None, 0)
        (one,) = _generate(llm, PROMPTS[0], _greedy(max_tokens=1, prompt_logprobs=2))
        assert out.prompt_logprobs == one.prompt_logprobs
        assert len(out.prompt_logprobs) == len(out.prompt_token_ids)
        (part,) = _streamed(llm, PROMPTS[0], params)[0]
        assert (part.text, part.token_ids, part.finish_reason) == ("", [], "length")

    def test_beside_others_and_in_chunks(self, shipped: Path) -> None:
        prompts = random_prompts([70, 16, 1, 33, 256], seed=4, vocab_size=4000)
        options: dict[str, Any] = {"max_model_len": 256, "kvcache_block_size": 16}
        options |= {"max_num_batched_tokens": 24, "max_num_seqs": 3}
        params = [_greedy(max_tokens=0 if i != 1 else 9, prompt_logprobs=0, n=1 + i % 2)
                  for i in range(5)]  # fmt: skip
        with LLM(shipped, device="cpu", **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            lengths = [[len(one.token_ids) for one in out.outputs] for out in outputs]
            assert lengths == [[0], [9, 9], [0], [0, 0], [0]]
            for prompt, out in zip(prompts, outputs, strict=True):
                (alone,) = _generate(llm, [prompt], _greedy(max_tokens=0, prompt_logprobs=0))
                scores = [one.prompt_logprobs[1:] for one in (alone, out)]
                assert [list(entry) for entry in scores[0]] == [[token] for token in prompt[1:]]
                own, crowd = ([next(iter(e.values())) for e in entries] for entries in scores)
                assert own == pytest.approx(crowd, abs=1e-4)
            # A processor would fail, but is never called.
            (out,) = _generate(
                llm, [prompts[1]], _greedy(max_tokens=0, logits_processors=[(1).__add__])
            )
            assert out.error is None

    def test_a_prompt_may_fill_the_window(self, llm: LLM) -> None:
        (prompt,) = random_prompts([256], seed=5, vocab_size=4000)
        (out,) = _generate(llm, [prompt], _greedy(max_tokens=0, prompt_logprobs=0))
        assert len(out.prompt_logprobs) == 256
        with pytest.raises(RequestError, match="max_model_len"):
            _generate(llm, [[*prompt, 5]], _greedy(max_tokens=0))


class TestLogprobs:
    @pytest.fixture(scope="class")
    def expected(self, shipped: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)

    def test_sums(self, llm: LLM) -> None:
        (out,) = _generate(llm, PROMPTS[0], _greedy(logprobs=2))
        own = [entry[token] for entry, token in zip(out.logprobs, out.token_ids, strict=True)]
        assert out.cumulative_logprob == added_logprobs(0.0, [{0: value} for value in own])
        assert math.isclose(out.cumulative_logprob, math.fsum(own), rel_tol=1e-12)
        (out,) = _generate(llm, PROMPTS[0], _greedy())
        assert (out.logprobs, out.cumulative_logprob) == (None, None)

    @pytest.mark.parametrize("details", [False, True])
    def test_streams_have_those_of_their_tokens(self, llm: LLM, details: bool) -> None:
        params = _greedy(logprobs=2, logprobs_details=details)
        outputs = _generate(llm, PROMPTS, params)
        for index, parts in _streamed(llm, PROMPTS, params).items():
            told = [entry for part in parts for entry in part.logprobs]
            assert told == outputs[index].logprobs
            assert repr(told) == repr(outputs[index].logprobs)
            sums = [part.cumulative_logprob for part in parts]
            assert sums[-1] == outputs[index].cumulative_logprob
            assert sums == sorted(sums, reverse=True)
            counts = [len(part.token_ids) for part in parts]
            assert [len(part.logprobs) for part in parts] == counts
        assert _streamed(llm, PROMPTS[0], _greedy())[0][-1].logprobs is None

    def test_texts_of_tokens(self, llm: LLM) -> None:
        tokens = [300, EOS, 301]
        values = {"logprobs": 3, "prompt_logprobs": 1, "max_tokens": 3}
        params = _greedy(**values, logprobs_details=True, logits_processors=_forced(*tokens))
        (out,) = _generate(llm, PROMPTS[0], params)
        tokenizer: Any = llm.tokenizer
        assert out.prompt_logprobs[0] is None
        for entry in [*out.logprobs, *out.prompt_logprobs[1:]]:
            for token, one in entry.items():
                assert type(one) is Logprob
                assert one.decoded_token == tokenizer.decode([token])
        assert out.logprobs[1][EOS].decoded_token == NAME
        (plain,) = _generate(llm, PROMPTS[0], _greedy(**values, logits_processors=_forced(*tokens)))
        assert plain.logprobs == out.logprobs
        assert {type(one) for entry in plain.logprobs for one in entry.values()} == {float}

    @pytest.mark.parametrize("company", [False, True])
    def test_ranks(self, llm: LLM, expected: Any, company: bool) -> None:
        """The tokens with a higher probability in transformers are counted."""
        values: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 12}
        values |= {"logprobs": 3, "prompt_logprobs": 2}
        params = SamplingParams(**values, logprobs_details=True)
        others = [_greedy(), SamplingParams(**values)] if company else []
        out, *rest = llm.generate(
            [PROMPTS[0], *PROMPTS[1 : 1 + len(others)]], [params, *others], use_tqdm=False
        )
        tokens = out.prompt_token_ids + out.token_ids
        with torch.inference_mode():
            scores = expected(torch.tensor([tokens])).logits[0].float().log_softmax(1)
        entries = [*out.prompt_logprobs[1:], *out.logprobs]
        ranks = []
        for token, row, entry in zip(tokens[1:], scores, entries, strict=False):
            assert next(iter(entry)) == token
            # Rounding may swap tokens whose values are within 1e-4 of each other, no others.
            for one, value in entry.items():
                surely = int((row > row[one] + 1e-4).sum()) + 1
                assert surely <= value.rank <= int((row > row[one] - 1e-4).sum())
            ranks.append(entry[token].rank)
        assert len(set(ranks)) > 5
        for other in rest[1:]:
            plain = [*other.prompt_logprobs[1:], *other.logprobs]
            assert {type(one) for entry in plain for one in entry.values()} == {float}


class TestDefaultsOfTheCheckpoint:
    @pytest.fixture
    def model(self, shipped: Path, tmp_path: Path) -> Path:
        return shutil.copytree(shipped, tmp_path / "model")

    def _write(self, model: Path, **values: Any) -> None:
        known = json.loads((model / "generation_config.json").read_text())
        (model / "generation_config.json").write_text(json.dumps({**known, **values}))

    def test_are_used_without_parameters(self, model: Path) -> None:
        self._write(model, do_sample=False, max_new_tokens=7, repetition_penalty=1.3)
        asked = SamplingParams(temperature=0, max_tokens=7, repetition_penalty=1.3)
        with LLM(model, device="cpu", max_model_len=64, max_num_seqs=4) as llm:
            assert llm.default_sampling_params() == llm.get_default_sampling_params() == asked
            expected = [out.token_ids for out in _generate(llm, PROMPTS, asked)]
            assert [len(tokens) for tokens in expected] == [7] * 3
            assert [out.token_ids for out in _generate(llm, PROMPTS, None)] == expected
            streamed: list[list[int]] = [[], [], []]
            for part in llm.stream(PROMPTS):
                streamed[part.index] += part.token_ids
            assert streamed == expected
            llm.add_request(PROMPTS[0])
            told: list[Output] = []
            while llm.has_unfinished:
                told += llm.step()
            assert [out.token_ids for out in told] == expected[:1]
            messages = [{"role": "user", "content": "Hi"}]
            (chat,) = llm.chat(messages, use_tqdm=False)
            assert chat.token_ids == llm.chat(messages, asked, False)[0].token_ids

    def test_are_not_used_with_parameters(self, model: Path) -> None:
        with LLM(model, device="cpu", max_model_len=64, max_num_seqs=4) as llm:
            expected = _generate(llm, PROMPTS, SamplingParams(seed=1, max_tokens=9))
        self._write(model, do_sample=False, max_new_tokens=7, repetition_penalty=1.3, top_k=2)
        with LLM(model, device="cpu", max_model_len=64, max_num_seqs=4) as llm:
            found = _generate(llm, PROMPTS, SamplingParams(seed=1, max_tokens=9))
        assert [out.token_ids for out in found] == [out.token_ids for out in expected]

    def test_a_length_beyond_the_window_ends_with_the_window(self, model: Path) -> None:
        self._write(model, do_sample=False, max_new_tokens=60, eos_token_id=[])
        with LLM(model, device="cpu", max_model_len=64, max_num_seqs=4) as llm:
            outputs = _generate(llm, [[5] * 4, [5] * 5, [5] * 63], None)
            assert [len(out.token_ids) for out in outputs] == [60, 59, 1]
            with pytest.raises(RequestError, match="max_model_len=64"):
                _generate(llm, [[5] * 64], None)

    def test_a_wrong_value_is_an_error_of_the_checkpoint(self, model: Path) -> None:
        self._write(model, top_p=7)
        with LLM(model, device="cpu", max_model_len=64, max_num_seqs=4) as llm:
            for _ in range(2):
                with pytest.raises(CheckpointError, match=r"generation_config.json: top_p=7"):
                    _generate(llm, PROMPTS, None)
            with pytest.raises(RequestError, match="top_k=-5"):
                llm.default_sampling_params(top_p=0.5, top_k=-5)
            assert llm.default_sampling_params(top_p=0.5) == SamplingParams(top_p=0.5)
            assert len(_generate(llm, PROMPTS, _greedy())) == 3


class TestOptions:
    @pytest.mark.parametrize(
        ("given", "dtype"),
        [
            ("half", "float16"),
            ("float", "float32"),
            (torch.float32, "float32"),
            (torch.bfloat16, "bfloat16"),
            (torch.float16, "float16"),
        ],
        ids=str,
    )
    def test_dtypes(self, given: Any, dtype: str) -> None:
        assert Config.from_options("x", dtype=given).dtype == dtype

    @pytest.mark.parametrize("given", [torch.float64, torch.int8, np.float32, "torch.float32"])
    def test_other_dtypes(self, given: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            Config.from_options("x", dtype=given)
        assert caught.value.field == "dtype"

    def test_numbers_of_numpy(self) -> None:
        values: dict[str, Any] = {"max_num_seqs": np.int64(8), "seed": np.uint8(3)}
        values |= {"gpu_memory_utilization": np.float64(0.5), "enforce_eager": np.bool_(True)}
        config = Config.from_options("x", **values)
        kinds = [type(getattr(config, name)) for name in values]
        assert kinds == [int, int, float, bool]
        with pytest.raises(ConfigError, match="integer"):
            Config.from_options("x", max_num_seqs=np.float64(8))

    @pytest.mark.parametrize(
        ("name", "value", "fix"),
        [
            ("trust_remote_code", True, "runs no code"),
            ("block_size", 16, "Did you mean 'kvcache_block_size'?"),
            ("torch_dtype", "auto", "Did you mean 'dtype'?"),
            ("quantization", "awq", "unquantized"),
            ("enable_chunked_prefill", False, "max_num_batched_tokens"),
            ("pipeline_parallel_size", 2, "tensor_parallel_size"),
            ("pipeline_parallel_size", True, "tensor_parallel_size"),
            ("swap_space", 4, "recomputed"),
            ("generation_config", "vllm", "SamplingParams()"),
            ("max_num_seq", 2, "Did you mean 'max_num_seqs'?"),
        ],
    )
    @pytest.mark.parametrize(
        "make", [Config.from_options, lambda model, **o: Config(model=model, **o)]
    )
    def test_names_of_other_engines(self, make: Any, name: str, value: Any, fix: str) -> None:
        with pytest.raises(ConfigError, match="unknown option") as caught:
            make("x", **{name: value})
        assert caught.value.field == name
        assert fix in caught.value.fix

    def test_what_this_engine_does_anyway_is_accepted(self) -> None:
        values: dict[str, Any] = {"trust_remote_code": False, "enable_chunked_prefill": True}
        values |= {"quantization": None, "pipeline_parallel_size": 1, "generation_config": "auto"}
        assert Config.from_options("x", max_num_seqs=7, **values) == Config(
            model="x", max_num_seqs=7
        )

    def test_help_shows_all_options(self) -> None:
        shown = inspect.signature(LLM).parameters
        assert list(shown)[:2] == ["model", "preset"]
        assert set(shown) == {"preset", *(one.name for one in fields(Config))}
        assert shown["max_num_seqs"].default == 512
        text = inspect.getdoc(LLM.__init__) or ""
        for name in [*shown, *PRESETS]:
            assert name in text

    def test_another_tokenizer(self, shipped: Path, tmp_path: Path) -> None:
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(shipped / name, tmp_path)
        options: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "max_num_seqs": 2}
        with LLM(shipped, **options) as llm:
            (expected,) = _generate(llm, PROMPTS[0], _greedy())
        with LLM(tmp_path, tokenizer=shipped, **options) as llm:
            assert llm.get_tokenizer() is llm.tokenizer is not None
            (out,) = _generate(llm, PROMPTS[0], _greedy())
            assert (out.text, out.token_ids) == (expected.text, expected.token_ids)
            schema = SamplingParams(json_schema={"type": "boolean"}, max_tokens=20)
            (out,) = _generate(llm, PROMPTS[0], schema)
            assert isinstance(json.loads(out.text), bool)
        with pytest.raises(CheckpointError, match="has no tokenizer"):
            LLM(shipped, tokenizer=str(tmp_path), **options)
        with pytest.raises(CheckpointNotFoundError, match="tokenizer='/nowhere'"):
            LLM(shipped, tokenizer="/nowhere", **options)
