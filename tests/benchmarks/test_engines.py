"""The adapters of other engines, against stand-ins with the interfaces that those publish."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.compare import Contender
from benchmarks.engines import (
    ENGINES,
    VLLM,
    Engine,
    MiniSGLang,
    NanoVLLM,
    Ours,
    Sequential,
    Setting,
    Transformers,
)
from benchmarks.tokenizer import with_tokenizer
from benchmarks.workloads import random_workload, seeds_workload, works_for
from tests.checkpoints import Checkpoints

WORK = replace(random_workload("w", 3, (4, 9), (3, 6), 200), temperature=0.6)


@dataclass
class Params:
    """Sampling parameters; a name that an engine does not publish is a TypeError."""

    temperature: float
    max_tokens: int
    ignore_eos: bool = False


@dataclass
class VLLMParams(Params):
    detokenize: bool = True


@dataclass
class Calls:
    """What an adapter asked of an engine."""

    options: dict[str, Any] = field(default_factory=dict)
    prompts: list[Any] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> None:
    module = ModuleType(name)
    vars(module).update(values)
    monkeypatch.setitem(sys.modules, name, module)


def _fake(calls: Calls, answer: Any) -> type:
    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            calls.options = {"model": model, **options}

        def generate(self, prompts: list[Any], params: list[Any], **options: Any) -> list[Any]:
            assert options in ({}, {"use_tqdm": False})
            calls.prompts, calls.params = prompts, params
            return [answer([7] * one.max_tokens) for one in params]

    return LLM


@pytest.fixture
def setting(checkpoints: Checkpoints) -> Setting:
    path = checkpoints["qwen3-gqa6"]
    return Setting(str(path), "float32", "cpu", 256, kv_bytes=1 << 20, threads=1)


def test_vllm(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    calls = Calls()
    llm = _fake(calls, lambda ids: SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]))
    _module(monkeypatch, "vllm", LLM=llm, SamplingParams=VLLMParams, TokensPrompt=dict)
    outputs = VLLM(setting).generate(WORK)
    assert outputs == [[7] * n for n in WORK.lengths]
    assert calls.options["model"] == setting.model
    assert calls.options["kv_cache_memory_bytes"] == 1 << 20
    assert calls.options["skip_tokenizer_init"]
    assert calls.prompts == [{"prompt_token_ids": prompt} for prompt in WORK.prompts]
    assert calls.params == [VLLMParams(0.6, n, True, False) for n in WORK.lengths]


def test_nano_vllm(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    calls = Calls()
    llm = _fake(calls, lambda ids: {"text": "", "token_ids": ids})
    _module(monkeypatch, "nanovllm", LLM=llm, SamplingParams=Params)
    engine = NanoVLLM(setting)
    assert engine.generate(WORK) == [[7] * n for n in WORK.lengths]
    assert calls.prompts == WORK.prompts
    assert calls.params == [Params(0.6, n, True) for n in WORK.lengths]
    engine.generate(replace(WORK, temperature=0.0))
    # A temperature of 0 is refused there.
    assert all(0 < one.temperature < 1e-4 for one in calls.params)


def test_mini_sglang(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    calls = Calls()
    _module(monkeypatch, "minisgl")
    _module(monkeypatch, "minisgl.core", SamplingParams=Params)
    _module(monkeypatch, "minisgl.llm", LLM=_fake(calls, lambda ids: {"token_ids": ids[1:]}))
    outputs = MiniSGLang(setting).generate(WORK)
    assert [len(out) + MiniSGLang.unreturned for out in outputs] == WORK.lengths
    # K and V of 2 layers with 2 heads of 64 in float32.
    assert calls.options["num_page_override"] == (1 << 20) // (2 * 2 * 2 * 64 * 4)
    assert calls.options["page_size"] == 1


@pytest.mark.parametrize("engine", [Ours, Transformers, Sequential])
def test_the_same_greedy_tokens_and_times_for_each(engine: type[Engine], setting: Setting) -> None:
    work = replace(WORK, temperature=0.0)
    expected = Transformers(setting).generate(work)
    one = engine(setting)
    assert one.generate(work) == expected
    trace = one.trace(work)
    assert trace is not None
    assert [len(times) for times in trace.token_times] == work.lengths
    assert all(t > 0 for times in trace.token_times for t in times)
    assert all(times == sorted(times) for times in trace.token_times)
    assert all(span.start <= span.end for span in trace.spans)


def test_our_trace_has_every_phase(setting: Setting) -> None:
    trace = Ours(setting).trace(WORK)
    assert trace is not None
    assert {span.phase for span in trace.spans} >= {"plan", "stage", "launch", "wait", "commit"}
    launches = {s.step_id: s for s in trace.spans if s.phase == "launch"}
    for span in trace.spans:
        if span.phase == "stage":
            launch = launches[span.step_id]
            assert launch.start <= span.start <= span.end <= launch.end


@pytest.mark.slow
def test_our_trace_of_several_devices_has_times(setting: Setting) -> None:
    work = replace(WORK, temperature=0.0)
    trace = Ours(replace(setting, options={"tensor_parallel_size": 2})).trace(work)
    assert trace is not None
    assert [len(times) for times in trace.token_times] == work.lengths
    assert trace.gaps[0] > 0
    # What the ranks do happens in processes of their own.
    assert {span.phase for span in trace.spans} >= {"plan", "launch", "wait", "commit"}
    assert not {span.phase for span in trace.spans} & {"stage", "device"}


def test_a_checkpoint_without_a_tokenizer_gets_one(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    model = checkpoints["qwen3-gqa6"]
    folder = Path(with_tokenizer(model, tmp_path))
    assert {file.name for file in model.iterdir()} < {file.name for file in folder.iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer.decode([3, 150_000]), str)
    assert isinstance(tokenizer.eos_token_id, int)
    assert with_tokenizer(folder, tmp_path) == str(folder)


@pytest.mark.parametrize("name", ["vllm", "nano-vllm", "mini-sglang"])
def test_what_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ENGINES[name].missing() == ENGINES[name].module


def test_labels() -> None:
    assert Contender.parse("ours:throughput").options == {"preset": "throughput"}
    assert Contender.parse("vllm").engine == "vllm"
    for wrong in ("vlm", "vllm:throughput", ""):
        with pytest.raises(ValueError, match=r"vllm|Known"):
            Contender.parse(wrong)


def test_the_founding_workload_is_what_it_was() -> None:
    work = seeds_workload()
    assert (sum(map(len, work.prompts)), work.num_output_tokens) == (142_827, 133_966)
    assert works_for("seeds128", 151_936)[0].lengths == work.lengths[:128]
    assert max(max(p) for p in seeds_workload(vocab_size=300).prompts) == 299


def test_rotated_prompts_keep_their_tokens_and_share_no_prefix() -> None:
    turned = WORK.rotated(2)
    assert turned.lengths == WORK.lengths
    for prompt, other in zip(WORK.prompts, turned.prompts, strict=True):
        assert sorted(prompt) == sorted(other)
        assert prompt[2:] + prompt[:2] == other


def test_our_parameters_of_a_workload() -> None:
    for one, length in zip(WORK.sampling_params(top_k=3), WORK.lengths, strict=True):
        assert (one.temperature, one.max_tokens, one.top_k) == (0.6, length, 3)
        assert one.ignore_eos
