"""The user's entry, from prompts to outputs."""

from __future__ import annotations

import gc
import json
import random
import shutil
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from engine.checking.fake_runner import FakeRunner
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from engine.types import StepHandle, StepPlan, StepResult
from layers.linear import VocabEmbedding
from llm import LLM, SamplingParams
from tests.checkpoints import Checkpoints, random_prompts
from tests.custom_parts import OneAtATime, ShuffledBlocks, make_one_at_a_time
from utils.errors import CheckpointError, EngineClosedError, RequestError, StepError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
RANDOM = SamplingParams(temperature=1.0, max_tokens=12, seed=5, ignore_eos=True)
PROMPTS = random_prompts([3, 20, 1, 33], seed=21)
DEPTHS = [0, 1]


@pytest.fixture(scope="module")
def small(checkpoints: Checkpoints) -> Path:
    """A random checkpoint without a tokenizer."""
    return checkpoints["qwen3-gqa2-wide-heads"]


@pytest.fixture(scope="module")
def python_llm(shipped: Path) -> Iterator[LLM]:
    """An engine of the shipped model, which has a tokenizer."""
    with LLM(shipped, device="cpu", max_num_seqs=8) as llm:
        yield llm


def _small_llm(path: Path, **options: Any) -> LLM:
    defaults = {"device": "cpu", "kvcache_block_size": 16, "max_num_seqs": 4, "max_model_len": 128}
    return LLM(path, **{**defaults, **options})


def _tokens(outputs: Iterable[dict[str, Any]]) -> list[list[int]]:
    return [out["token_ids"] for out in outputs]


def _generate(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[list[int]]:
    return _tokens(llm.generate(prompts, params, use_tqdm=False))


def _assert_idle(llm: LLM) -> None:
    stats = llm.stats()
    assert not llm.has_unfinished
    assert stats.unfinished_requests == 0
    assert stats.num_free_blocks == stats.num_blocks


def _tensors() -> int:
    """How many tensors there are in this process."""
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


class TestOutputs:
    def test_have_text_tokens_reason_and_prompt(self, python_llm: LLM) -> None:
        (out,) = python_llm.generate(["import os\n"], GREEDY, use_tqdm=False)
        assert set(out) == {
            *("request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "finished", "outputs"),
            *("text", "token_ids", "cumulative_logprob", "logprobs", "hidden_states"),
            *("finish_reason", "stop_reason", "error", "metrics"),
        }
        tokenizer = python_llm.tokenizer
        assert tokenizer is not None
        assert out["prompt_token_ids"] == tokenizer.encode("import os\n")
        assert len(out["token_ids"]) == 12
        assert out["text"] == tokenizer.decode(out["token_ids"], skip_special_tokens=True)
        assert out["finish_reason"] == "length"

    def test_come_in_the_order_of_the_prompts(self, small: Path) -> None:
        prompts = random_prompts([40, 1, 30, 2, 20, 3], seed=22)
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
            for n in (9, 1, 30, 2, 5, 7)
        ]
        with _small_llm(small, max_num_seqs=2) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [out["prompt_token_ids"] for out in outputs] == prompts
        assert [len(out["token_ids"]) for out in outputs] == [9, 1, 30, 2, 5, 7]

    def test_texts_and_token_lists_may_be_mixed(self, python_llm: LLM) -> None:
        tokenizer = python_llm.tokenizer
        assert tokenizer is not None
        tokens = tokenizer.encode("def f(x):")
        first, second = _generate(python_llm, ["def f(x):", tokens])
        assert first == second

    def test_a_single_prompt_counts_as_a_list(self, python_llm: LLM) -> None:
        (from_text,) = _generate(python_llm, "def f(x):")
        (from_list,) = _generate(python_llm, ["def f(x):"])
        assert from_text == from_list

    def test_a_single_token_list_counts_as_a_list(self, python_llm: LLM) -> None:
        assert _generate(python_llm, [5, 6, 7]) == _generate(python_llm, [[5, 6, 7]])

    def test_no_prompts_give_no_outputs(self, python_llm: LLM) -> None:
        assert python_llm.generate([], GREEDY, use_tqdm=False) == []

    def test_default_parameters_are_used_without_any(self, small: Path) -> None:
        with _small_llm(small) as llm:
            (out,) = llm.generate([PROMPTS[0]], use_tqdm=False)
        assert len(out["token_ids"]) == SamplingParams().max_tokens

    def test_one_parameter_set_serves_all_or_each_its_own(self, small: Path) -> None:
        with _small_llm(small) as llm:
            together = _generate(llm, PROMPTS, GREEDY)
            apart = _generate(llm, PROMPTS, [GREEDY] * len(PROMPTS))
        assert together == apart

    def test_the_callers_lists_are_left_alone(self, small: Path) -> None:
        prompt = [1, 2, 3]
        with _small_llm(small) as llm:
            (out,) = llm.generate([prompt], GREEDY, use_tqdm=False)
        out["prompt_token_ids"].append(99)
        assert prompt == [1, 2, 3]

    def test_are_the_same_again(self, small: Path) -> None:
        with _small_llm(small) as llm:
            assert _generate(llm, PROMPTS) == _generate(llm, PROMPTS)

    def test_max_tokens_none_runs_to_the_end_of_the_context(self, small: Path) -> None:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        with _small_llm(small, max_model_len=60) as llm:
            outputs = llm.generate([PROMPTS[0], random_prompts([59], seed=3)[0]], params)
        assert [len(out["token_ids"]) for out in outputs] == [57, 1]
        assert [out["finish_reason"] for out in outputs] == ["length", "length"]

    def test_a_request_may_fill_the_context_exactly(self, small: Path) -> None:
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        with _small_llm(small, max_model_len=128) as llm:
            (out,) = llm.generate(random_prompts([64], seed=3), params, use_tqdm=False)
        assert len(out["token_ids"]) == 64

    def test_a_progress_bar_counts_requests(
        self, small: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with _small_llm(small) as llm:
            llm.generate(PROMPTS, GREEDY, use_tqdm=True)
            assert f"{len(PROMPTS)}/{len(PROMPTS)}" in capsys.readouterr().err
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert capsys.readouterr().err == ""


def _with_eos(path: Path, target: Path, *, config: Any, generation: Any) -> Path:
    """A copy of a checkpoint that declares these end-of-sequence tokens."""
    shutil.copytree(path, target)
    data = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**data, "eos_token_id": config}))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return target


def _distinct_ends(outputs: list[list[int]]) -> list[int]:
    """One token from each output, so that no other one of them occurs there earlier."""
    for ends in product(*(tokens[2:12] for tokens in outputs)):
        firsts = [next(t for t in tokens if t in ends) for tokens in outputs]
        if firsts == list(ends) and len(set(ends)) == len(ends):
            return firsts
    raise AssertionError("choose other prompts")


class TestEnds:
    @pytest.mark.parametrize("depth", DEPTHS)
    def test_every_declared_end_token_ends_a_request(
        self, small: Path, tmp_path: Path, depth: int
    ) -> None:
        """One is in config.json, two are in generation_config.json."""
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        with _small_llm(small) as llm:
            free = _generate(llm, PROMPTS[:3], params)
        ends = _distinct_ends(free)
        path = _with_eos(small, tmp_path / "eos", config=ends[0], generation=ends[1:])
        honouring = SamplingParams(temperature=0, max_tokens=40)
        with _small_llm(path, pipeline_depth=depth) as llm:
            outputs = llm.generate(PROMPTS[:3], honouring, use_tqdm=False)
            assert _generate(llm, PROMPTS[:3], params) == free
            _assert_idle(llm)
        for out, tokens in zip(outputs, free, strict=True):
            first = next(i for i, token in enumerate(tokens) if token in ends)
            assert out["token_ids"] == tokens[: first + 1]
            assert out["finish_reason"] == "stop"
        assert [out["token_ids"][-1] for out in outputs] == ends

    def test_special_tokens_are_in_token_ids_and_not_in_text(self, python_llm: LLM) -> None:
        prompt = "<|im_start|>user\nWrite a function that adds.<|im_end|>\n<|im_start|>assistant\n"
        params = SamplingParams(temperature=0, max_tokens=400)
        (out,) = python_llm.generate(prompt, params, use_tqdm=False)
        assert out["finish_reason"] == "stop"
        assert out["token_ids"][-1] in (0, 2)
        assert "<|" not in out["text"]


class TestSeeds:
    """Equal seeds give equal tokens, whatever happens around the request."""

    @pytest.mark.parametrize("depth", DEPTHS)
    @pytest.mark.parametrize("max_num_seqs", [1, 4])
    def test_alone_and_in_a_batch(self, small: Path, depth: int, max_num_seqs: int) -> None:
        with _small_llm(small) as llm:
            (alone,) = _generate(llm, [PROMPTS[1]], RANDOM)
        others = SamplingParams(temperature=0.7, max_tokens=20, ignore_eos=True)
        with _small_llm(small, pipeline_depth=depth, max_num_seqs=max_num_seqs) as llm:
            params = [others, others, RANDOM, GREEDY]
            prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[3]]
            assert _generate(llm, prompts, params)[2] == alone

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_after_preemption(self, small: Path, depth: int) -> None:
        prompts = random_prompts([15, 14, 13], seed=23)
        params = [
            SamplingParams(temperature=0.8, max_tokens=40, seed=i, ignore_eos=True)
            for i in range(3)
        ]
        with _small_llm(small) as llm:
            alone = [_generate(llm, [p], s)[0] for p, s in zip(prompts, params, strict=True)]
        with _small_llm(small, num_kvcache_blocks=5, pipeline_depth=depth) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            _assert_idle(llm)
        assert sum(out["metrics"]["preemptions"] for out in outputs) > 0
        assert _tokens(outputs) == alone

    def test_other_seeds_give_other_tokens(self, small: Path) -> None:
        params = [
            SamplingParams(temperature=1.0, max_tokens=20, seed=seed, ignore_eos=True)
            for seed in (0, 1, 2**63 - 1)
        ]
        with _small_llm(small) as llm:
            outputs = _generate(llm, [PROMPTS[1]] * 3, params)
        assert len({tuple(tokens) for tokens in outputs}) == 3

    def test_requests_without_a_seed_differ_from_each_other(self, small: Path) -> None:
        params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
        with _small_llm(small) as llm:
            outputs = _generate(llm, [PROMPTS[1]] * 4, params)
        assert len({tuple(tokens) for tokens in outputs}) == 4

    def test_the_engines_seed_decides_where_a_request_has_none(self, small: Path) -> None:
        params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
        outputs = []
        for seed in (7, 7, 8):
            with _small_llm(small, seed=seed) as llm:
                outputs.append(_generate(llm, PROMPTS, params))
        assert outputs[0] == outputs[1]
        assert outputs[0] != outputs[2]

    def test_temperature_zero_ignores_seeds(self, small: Path) -> None:
        params = [
            SamplingParams(temperature=0, max_tokens=12, seed=seed, ignore_eos=True)
            for seed in (1, 2)
        ]
        with _small_llm(small) as llm:
            first, second = _generate(llm, [PROMPTS[1]] * 2, params)
            assert first == second == _generate(llm, [PROMPTS[1]])[0]

    @pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-39, 1e-45, 1e-300])
    def test_a_tiny_temperature_is_greedy(self, small: Path, temperature: float) -> None:
        params = SamplingParams(temperature=temperature, max_tokens=12, ignore_eos=True)
        with _small_llm(small) as llm:
            assert _generate(llm, PROMPTS, params) == _generate(llm, PROMPTS)

    @pytest.mark.parametrize("temperature", [1e3, 1e4])
    def test_a_huge_temperature_is_served(self, small: Path, temperature: float) -> None:
        params = SamplingParams(temperature=temperature, max_tokens=30, ignore_eos=True)
        with _small_llm(small) as llm:
            assert len(set(_generate(llm, PROMPTS[0], params)[0])) > 20


class TestLife:
    def test_the_context_manager_closes(self, small: Path) -> None:
        with _small_llm(small) as llm:
            pass
        with pytest.raises(EngineClosedError):
            llm.generate([[1]], GREEDY)

    def test_a_broken_tokenizer_leaves_no_engine(self, shipped: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(shipped, tmp_path / "model")
        (folder / "tokenizer.json").write_text("{")
        before = [thread.name for thread in threading.enumerate()].count("step")
        with pytest.raises(CheckpointError, match="tokenizer") as caught:
            LLM(folder, device="cpu", max_model_len=64)
        assert [thread.name for thread in threading.enumerate()].count("step") == before
        del caught

    def test_close_twice(self, small: Path) -> None:
        llm = _small_llm(small)
        llm.close()
        llm.close()

    def test_close_after_an_error_inside_the_context(self, small: Path) -> None:
        with pytest.raises(ZeroDivisionError), _small_llm(small) as llm:
            _ = 1 // 0
        with pytest.raises(EngineClosedError):
            llm.generate([[1]], GREEDY)

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_the_engine_refuses_work_after_close(self, small: Path, depth: int) -> None:
        llm = _small_llm(small, pipeline_depth=depth)
        llm.close()
        with pytest.raises(EngineClosedError):
            llm.engine.add_request([1], GREEDY)
        with pytest.raises(EngineClosedError):
            llm.engine.step()

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_close_with_requests_in_flight_ends_them(self, small: Path, depth: int) -> None:
        llm = _small_llm(small, pipeline_depth=depth, max_num_seqs=2)
        seqs = [llm.engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
        for _ in range(3):
            llm.engine.step()
        llm.close()
        assert [seq.finish_reason for seq in seqs] == ["abort"] * 4
        _assert_idle(llm)

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_close_gives_the_memory_back(self, small: Path, depth: int) -> None:
        before = _tensors()
        llm = _small_llm(small, pipeline_depth=depth)
        _generate(llm, PROMPTS)
        assert _tensors() > before
        llm.close()
        assert _tensors() == before

    def test_close_ends_its_threads(self, small: Path) -> None:
        before = threading.active_count()
        llm = _small_llm(small, pipeline_depth=1)
        _generate(llm, PROMPTS)
        assert threading.active_count() == before + 1
        llm.close()
        assert threading.active_count() == before

    def test_a_collected_engine_leaves_no_memory_behind(self, small: Path) -> None:
        before = _tensors()
        llm = _small_llm(small)
        _generate(llm, PROMPTS)
        assert _tensors() > before
        del llm
        assert _tensors() == before

    def test_one_device_needs_no_process_group(self, small: Path) -> None:
        with _small_llm(small) as llm:
            _generate(llm, PROMPTS)
            assert not torch.distributed.is_initialized()

    def test_config_is_resolved(self, small: Path) -> None:
        with LLM(small, device="cpu") as llm:
            config = llm.config
        assert (config.device, config.dtype, config.max_model_len) == ("cpu", "float32", 512)
        assert config.pipeline_depth == 0

    def test_without_a_tokenizer_there_are_tokens_but_no_text(self, small: Path) -> None:
        with _small_llm(small) as llm:
            assert llm.tokenizer is None
            (out,) = llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)
        assert out["text"] == ""
        assert len(out["token_ids"]) == 12

    def test_an_unusable_tokenizer_is_a_checkpoint_error(
        self, shipped: Path, tmp_path: Path
    ) -> None:
        path = shutil.copytree(shipped, tmp_path / "model")
        (path / "tokenizer.json").write_text('{"version": ')
        with pytest.raises(CheckpointError, match="tokenizer"):
            LLM(path, device="cpu", max_num_seqs=1, max_model_len=32)


def _step_all(llms: list[LLM], seqs: list[list[Sequence]]) -> None:
    """One step of each engine in turn, until all requests have finished."""
    while any(seq.finish_reason is None for group in seqs for seq in group):
        for llm in llms:
            if llm.engine.has_unfinished:
                llm.engine.step()
    for llm in llms:
        while llm.engine.has_unfinished:
            llm.engine.step()


class TestRequestsOneByOne:
    """add_request, step and abort."""

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_outputs_are_those_of_generate(self, small: Path, depth: int) -> None:
        with _small_llm(small, pipeline_depth=depth, max_num_seqs=2) as llm:
            expected = dict(enumerate(_generate(llm, PROMPTS)))
            first = llm.add_request(PROMPTS[0], GREEDY)
            ids = [first] + [llm.add_request(prompt, GREEDY) for prompt in PROMPTS[1:]]
            outputs = _step_to_the_end(llm)
            _assert_idle(llm)
        assert sorted(outputs) == ids
        assert {i: outputs[ids[i]]["token_ids"] for i in expected} == expected

    @pytest.mark.parametrize("by_generate", [False, True])
    def test_what_an_exception_ended_comes_with_the_next_step(
        self, small: Path, monkeypatch: pytest.MonkeyPatch, by_generate: bool
    ) -> None:
        with _small_llm(small, max_num_seqs=2) as llm:
            ended = llm.add_request(PROMPTS[0], GREEDY)

            def fails(*_: Any) -> None:
                raise ZeroDivisionError

            monkeypatch.setattr(llm.engine.scheduler, "commit", fails)
            with pytest.raises(ZeroDivisionError):
                _generate(llm, PROMPTS[1:]) if by_generate else llm.step()
            other = llm.add_request(PROMPTS[1], GREEDY)
            (out,) = llm.step()
            assert (out["request_id"], out["finish_reason"]) == (ended, "error")
            assert list(_step_to_the_end(llm)) == [other]

    def test_what_a_reset_of_the_engine_ended_comes_with_the_next_step(self, small: Path) -> None:
        with _small_llm(small) as llm:
            ended = llm.add_request(PROMPTS[0], GREEDY)
            llm.step()
            llm.engine.reset()
            assert llm.has_unfinished
            (out,) = llm.step()
            assert (out["request_id"], out["finish_reason"]) == (ended, "abort")
            assert not llm.has_unfinished

    @pytest.mark.parametrize("prompt", [5, None, b"text", {1: 2}, True, 1.5, np.int64(5), [], ()])
    def test_no_prompt(self, small: Path, prompt: Any) -> None:
        with _small_llm(small) as llm, pytest.raises(RequestError, match=r"^prompts?="):
            llm.add_request(prompt, GREEDY)

    def test_an_id_that_is_not_there_yet_is_passed_over(self, small: Path) -> None:
        with _small_llm(small) as llm:
            llm.abort(0)
            assert llm.add_request(PROMPTS[0], GREEDY) == 0
            assert _step_to_the_end(llm)[0]["finish_reason"] == "length"

    @pytest.mark.parametrize("depth", DEPTHS)
    @pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
    def test_abort_after_any_step(self, small: Path, depth: int, num_steps: int) -> None:
        with _small_llm(small, pipeline_depth=depth, max_num_seqs=2) as llm:
            alone = _generate(llm, PROMPTS)
            ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
            outputs: dict[int, dict[str, Any]] = {}
            for _ in range(num_steps):
                outputs |= {out["request_id"]: out for out in llm.step()}
            llm.abort(ids[0])
            llm.abort(ids[2])
            llm.abort(ids[0])
            llm.abort(10**6)
            outputs |= {out["request_id"]: out for out in llm.step()}
            assert {ids[0], ids[2]} == set(outputs)
            outputs |= _step_to_the_end(llm)
            _assert_idle(llm)
        reasons = [outputs[i]["finish_reason"] for i in ids]
        assert reasons == ["abort", "length", "abort", "length"]
        for i, tokens in zip(ids, alone, strict=True):
            part = outputs[i]["token_ids"]
            assert part == (
                tokens if outputs[i]["finish_reason"] == "length" else tokens[: len(part)]
            )

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_abort_from_another_thread_ends_a_request_of_generate(
        self, small: Path, depth: int
    ) -> None:
        with _small_llm(small, pipeline_depth=depth) as llm:
            request_id = llm.add_request(PROMPTS[0], GREEDY)
            stop = threading.Event()

            def abort_all() -> None:
                while not stop.wait(1e-3):
                    llm.abort(request_id + 1)

            thread = threading.Thread(target=abort_all)
            thread.start()
            long = SamplingParams(temperature=0, max_tokens=125, ignore_eos=True)
            outputs = llm.generate([[1], [2]], [long, GREEDY], use_tqdm=False)
            stop.set()
            thread.join()
            (beside,) = _step_to_the_end(llm).values()
            _assert_idle(llm)
        assert [out["finish_reason"] for out in outputs] == ["abort", "length"]
        assert len(outputs[0]["token_ids"]) < 125
        assert (beside["request_id"], beside["finish_reason"]) == (request_id, "length")

    def test_a_failed_step_ends_all_and_tells_the_next(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with _small_llm(small) as llm:
            llm.add_request(PROMPTS[0], GREEDY)
            llm.step()
            monkeypatch.setattr(llm.engine.scheduler, "schedule", lambda: None)
            with pytest.raises(StepError, match="planned nothing"):
                llm.step()
            (out,) = _step_to_the_end(llm).values()
            assert out["finish_reason"] == "error"
            assert len(out["token_ids"]) == 1
            assert not llm.has_unfinished

    def test_requests_are_checked(self, small: Path) -> None:
        with _small_llm(small) as llm:
            with pytest.raises(RequestError, match="is empty"):
                llm.add_request([])
            assert not llm.has_unfinished
            assert llm.step() == []
        with pytest.raises(EngineClosedError):
            llm.add_request([1])
        with pytest.raises(EngineClosedError):
            llm.step()


def _step_to_the_end(llm: LLM) -> dict[int, dict[str, Any]]:
    outputs: dict[int, dict[str, Any]] = {}
    while llm.has_unfinished:
        outputs |= {out["request_id"]: out for out in llm.step()}
    return outputs


class TestTwoEngines:
    OPTIONS = (
        {"kvcache_block_size": 16, "max_num_seqs": 3, "pipeline_depth": 1, "seed": 1},
        {"kvcache_block_size": 64, "max_num_seqs": 2, "max_num_batched_tokens": 9, "seed": 2},
    )

    def test_interleaved_they_do_what_each_does_alone(
        self, small: Path, checkpoints: Checkpoints
    ) -> None:
        paths = (small, checkpoints["qwen2-gqa6"])
        params = [GREEDY, RANDOM, SamplingParams(max_tokens=9), GREEDY]
        alone = []
        for path, options in zip(paths, self.OPTIONS, strict=True):
            with _small_llm(path, **options) as llm:
                alone.append(_generate(llm, PROMPTS, params))
        llms = [_small_llm(p, **o) for p, o in zip(paths, self.OPTIONS, strict=True)]
        seqs = [
            [llm.engine.add_request(p, s) for p, s in zip(PROMPTS, params, strict=True)]
            for llm in llms
        ]
        _step_all(llms, seqs)
        assert [[seq.output_token_ids for seq in group] for group in seqs] == alone
        for llm in llms:
            llm.close()

    def test_closing_one_leaves_the_other(self, small: Path) -> None:
        first, second = _small_llm(small), _small_llm(small)
        expected = _generate(first, PROMPTS)
        first.close()
        assert _generate(second, PROMPTS) == expected
        second.close()

    def test_in_threads(self, small: Path) -> None:
        outputs: dict[int, list[list[int]]] = {}

        def work(index: int) -> None:
            with _small_llm(small, **self.OPTIONS[index % 2]) as llm:
                outputs[index] = _generate(llm, PROMPTS)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outputs[0] == outputs[1]


class TestParts:
    @pytest.mark.parametrize(
        "scheduler",
        [OneAtATime, "tests.custom_parts:OneAtATime", make_one_at_a_time],
        ids=["class", "path", "factory"],
    )
    def test_a_scheduler_of_ones_own(self, small: Path, scheduler: Any) -> None:
        with _small_llm(small) as llm:
            expected = _generate(llm, PROMPTS)
        with _small_llm(small, scheduler=scheduler) as llm:
            assert _generate(llm, PROMPTS) == expected
            used = llm.engine.scheduler
            _assert_idle(llm)
        assert isinstance(used, OneAtATime)
        assert used.num_plans == 12 * len(PROMPTS)

    @pytest.mark.parametrize("block_manager", [ShuffledBlocks, "tests.custom_parts:ShuffledBlocks"])
    def test_a_block_manager_of_ones_own(self, small: Path, block_manager: Any) -> None:
        with _small_llm(small) as llm:
            expected = _generate(llm, PROMPTS)
        with _small_llm(small, block_manager=block_manager) as llm:
            assert isinstance(llm.engine.blocks, ShuffledBlocks)
            assert _generate(llm, PROMPTS) == expected
            _assert_idle(llm)

    def test_the_runner_is_closed_if_another_part_cannot_be_made(self, small: Path) -> None:
        closed: list[bool] = []

        def make_runner(config: Any, checkpoint: Any) -> Any:
            from engine.model_runner import LocalRunner

            class Watched(LocalRunner):
                def close(self) -> None:
                    closed.append(True)
                    super().close()

            return Watched(config, checkpoint)

        def fails(config: Any, blocks: Any, clock: Any) -> Any:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            _small_llm(small, model_runner=make_runner, scheduler=fails)
        assert closed == [True]

    def test_the_runner_is_closed_if_the_sanitizer_cannot_be_made(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed: list[bool] = []

        class Unsized(FakeRunner):
            kv_groups = property(lambda self: 1 // 0)

            def close(self) -> None:
                closed.append(True)
                super().close()

        with pytest.raises(ZeroDivisionError):
            _small_llm(small, model_runner=lambda *args: Unsized(*args), kv_sanitizer=True)
        assert closed == [True]

    def test_the_runner_is_closed_though_a_part_cannot_be_made_again(self, small: Path) -> None:
        made: list[Any] = []

        def once(*args: Any) -> Any:
            made.append(ContinuousScheduler(*args) if not made else 1 // 0)
            return made[0]

        llm = _small_llm(small, scheduler=once)
        with pytest.raises(ZeroDivisionError):
            llm.close()
        llm.close()
        with pytest.raises(EngineClosedError):
            llm.engine.runner.execute(StepPlan(0))


class _Raises:
    """Calls a function, but raises the `step`-th time; `before` or after the call."""

    def __init__(
        self, call: Callable[..., Any], step: int, error: BaseException, *, before: bool = True
    ) -> None:
        self._call = call
        self._left = step
        self._error = error
        self._before = before

    def __call__(self, *args: Any) -> Any:
        self._left -= 1
        raises = self._left == -1
        if raises and self._before:
            raise self._error
        value = self._call(*args)
        if raises:
            raise self._error
        return value


class _InterruptedOnce(StepHandle):
    """A handle whose first wait is interrupted."""

    def __init__(self, handle: StepHandle, error: BaseException) -> None:
        self._handle = handle
        self._errors = [error]

    def result(self) -> StepResult:
        if self._errors:
            raise self._errors.pop()
        return self._handle.result()


ERRORS = [RuntimeError("planted"), KeyboardInterrupt()]


class TestErrorsInside:
    """Whatever goes wrong, no request stays behind and the next one is served."""

    @pytest.fixture(params=DEPTHS, ids=["depth0", "depth1"])
    def llm(self, small: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
        with _small_llm(small, pipeline_depth=request.param, max_num_seqs=2) as llm:
            yield llm

    @staticmethod
    def _check(llm: LLM, error: type[BaseException], params: Any = GREEDY) -> None:
        with pytest.raises(error):
            llm.generate(PROMPTS, params, use_tqdm=False)
        _assert_idle(llm)
        with _small_llm(llm.engine.checkpoint.path) as fresh:
            assert _generate(llm, PROMPTS) == _generate(fresh, PROMPTS)
        _assert_idle(llm)

    @pytest.mark.parametrize("step", [0, 1, 5])
    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    @pytest.mark.parametrize(("part", "method"), [("scheduler", "schedule"), ("runner", "execute")])
    def test_a_call_that_raises(
        self,
        llm: LLM,
        monkeypatch: pytest.MonkeyPatch,
        part: str,
        method: str,
        step: int,
        error: BaseException,
    ) -> None:
        owner = getattr(llm.engine, part)
        monkeypatch.setattr(owner, method, _Raises(getattr(owner, method), step, error))
        self._check(llm, type(error))

    @pytest.mark.parametrize("before", [True, False])
    @pytest.mark.parametrize("step", [0, 1, 5])
    def test_a_commit_that_raises(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch, step: int, before: bool
    ) -> None:
        commit = llm.engine.scheduler.commit
        raises = _Raises(commit, step, RuntimeError("planted"), before=before)
        monkeypatch.setattr(llm.engine.scheduler, "commit", raises)
        self._check(llm, RuntimeError)

    @pytest.mark.parametrize("step", [0, 1, 5])
    def test_a_processor_that_raises_ends_its_request_alone(self, llm: LLM, step: int) -> None:
        error = RuntimeError("planted")
        fails = _Raises(lambda token_ids, logits: logits, step, error)
        failing = replace(GREEDY, logits_processors=(fails,))
        outputs = llm.generate(PROMPTS, [GREEDY, failing, GREEDY, GREEDY], use_tqdm=False)
        expected = _generate(llm, PROMPTS)
        assert [out["token_ids"] for out in outputs] == [
            tokens[: step if i == 1 else None] for i, tokens in enumerate(expected)
        ]
        assert outputs[1]["finish_reason"] == "error"
        assert repr(outputs[1]["error"].__cause__) == repr(error)
        _assert_idle(llm)

    @pytest.mark.parametrize("step", [0, 1, 5])
    def test_a_wait_that_is_interrupted(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        execute, steps = llm.engine.runner.execute, [step]

        def wrapped(plan: StepPlan) -> StepHandle:
            handle = execute(plan)
            if plan.step_id not in steps:
                return handle
            steps.clear()
            return _InterruptedOnce(handle, KeyboardInterrupt())

        monkeypatch.setattr(llm.engine.runner, "execute", wrapped)
        self._check(llm, KeyboardInterrupt)

    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    @pytest.mark.parametrize("before", [True, False])
    def test_a_request_that_cannot_be_queued(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException, before: bool
    ) -> None:
        """Also beside another one, which ends with it: the part that failed is made anew."""
        llm.add_request(PROMPTS[0], GREEDY)
        llm.step()
        queue = llm.engine.scheduler.queue  # type: ignore[attr-defined]
        monkeypatch.setattr(queue, "push", _Raises(queue.push, 0, error, before=before))
        with pytest.raises(type(error)):
            llm.add_request(PROMPTS[1], GREEDY)
        (ended,) = llm.step()
        assert (ended["finish_reason"], type(ended["error"])) == ("error", StepError)
        with _small_llm(llm.engine.checkpoint.path) as fresh:
            assert _generate(llm, PROMPTS) == _generate(fresh, PROMPTS)
        _assert_idle(llm)

    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    @pytest.mark.parametrize(("part", "method"), [("queue", "discard"), ("blocks", "release")])
    def test_a_stream_whose_end_fails(
        self,
        llm: LLM,
        monkeypatch: pytest.MonkeyPatch,
        part: str,
        method: str,
        error: BaseException,
    ) -> None:
        parts: dict[str, Any] = {
            "queue": llm.engine.scheduler.queue,  # type: ignore[attr-defined]
            "blocks": llm.engine.blocks,
        }
        stream = llm.stream([*PROMPTS, *PROMPTS], GREEDY)
        next(stream)
        owner = parts[part]
        monkeypatch.setattr(owner, method, _Raises(getattr(owner, method), 0, error))
        with suppress(type(error)):
            stream.close()
        with _small_llm(llm.engine.checkpoint.path) as fresh:
            assert _generate(llm, PROMPTS) == _generate(fresh, PROMPTS)
        _assert_idle(llm)

    def test_the_message_of_a_failed_step_names_the_cause(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(VocabEmbedding, "__call__", _Raises(int, 0, RuntimeError("planted")))
        with pytest.raises(StepError, match="step 0 failed: RuntimeError: planted"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)

    def test_a_scheduler_that_plans_nothing_is_an_error(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(llm.engine.scheduler, "schedule", lambda: None)
        self._check(llm, StepError)


class _Interrupt:
    """Raises KeyboardInterrupt at the `line`-th line that a step runs of the planning code."""

    FILES = ("llm_engine", "scheduler", "running_batch")

    def __init__(self, line: int) -> None:
        root = Path(__file__).parents[1] / "engine"
        self._files = {str(root / f"{name}.py") for name in self.FILES}
        self._line = line
        self.lines: list[tuple[str, int]] = []
        self.where = ""

    def generate(self, llm: LLM) -> None:
        step = llm.engine.step

        def traced() -> Any:
            sys.settrace(self._call)
            try:
                return step()
            finally:
                sys.settrace(None)

        llm.engine.step = traced  # type: ignore[method-assign]
        try:
            llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
        finally:
            llm.engine.step = step  # type: ignore[method-assign]

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._count if frame.f_code.co_filename in self._files else None

    def _count(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_name, frame.f_lineno))
            if len(self.lines) == self._line:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_name}:{frame.f_lineno}, the {self._line}th"
                raise KeyboardInterrupt
        return self._count


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_interrupt_at_any_line_of_a_step_leaves_the_engine_usable(
    small: Path, depth: int
) -> None:
    """Ctrl-C arrives wherever the interpreter happens to be."""
    with _small_llm(small, pipeline_depth=depth) as llm:
        expected = _generate(llm, PROMPTS[:2])
        dry_run = _Interrupt(line=-1)
        dry_run.generate(llm)
    moments = defaultdict(list)
    for number, place in enumerate(dry_run.lines, 1):
        moments[place].append(number)
    assert len(moments) > 150
    broken = set()
    llm = _small_llm(small, pipeline_depth=depth)
    # Every line once, at one step or another.
    for line in map(random.choice, moments.values()):
        interrupt = _Interrupt(line)
        try:
            with pytest.raises(KeyboardInterrupt):
                interrupt.generate(llm)
            assert llm.stats().unfinished_requests == 0
            assert _generate(llm, PROMPTS[:2]) == expected
            _assert_idle(llm)
        except Exception as error:
            broken.add(f"{interrupt.where} {type(error).__name__}")
            llm = _small_llm(small, pipeline_depth=depth)
    llm.close()
    assert broken == set()
