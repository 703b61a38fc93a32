"""Calls as scripts for nano-vLLM, vLLM and transformers make them, on the model that ships.

Each test is such a script with the import and the model's path of this engine. What else is changed
is said there, and in docs/migrating.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from llm import LLM, SamplingParams

PROMPTS = ["import os\n", "class Stack:\n", "def main(args):\n    ", "for i in range("]


@pytest.fixture(scope="module")
def model(shipped: Path) -> str:
    return str(shipped)


@pytest.fixture
def llms() -> Iterator[list[LLM]]:
    """The engines that a script leaves open."""
    made: list[LLM] = []
    yield made
    for llm in made:
        llm.close()


def test_nano_vllm_example(model: str, llms: list[LLM], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = LLM(model, enforce_eager=True, tensor_parallel_size=1)
    llms.append(llm)
    sampling_params = SamplingParams(temperature=0.6, max_tokens=8)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in PROMPTS
    ]
    outputs = llm.generate(prompts, sampling_params)
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"{prompt!r}: {output['text']!r}", output["token_ids"])  # noqa: T201
    assert capsys.readouterr().out.count("<|im_start|>user") == 4


def test_nano_vllm_bench(model: str, llms: list[LLM]) -> None:
    drawn = Random(0)
    llm = LLM(model, enforce_eager=False, max_model_len=512)
    llms.append(llm)
    ids = [[drawn.randint(0, 4000) for _ in range(drawn.randint(10, 60))] for _ in range(8)]
    sampling_params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=drawn.randint(2, 9))
        for _ in range(8)
    ]
    llm.generate(["Benchmark: "], SamplingParams())
    outputs = llm.generate(ids, sampling_params, use_tqdm=False)
    total = sum(params.max_tokens or 0 for params in sampling_params)
    assert sum(len(out["token_ids"]) for out in outputs) == total
    # The line for vLLM in the same script.
    wrapped = llm.generate([{"prompt_token_ids": p} for p in ids], sampling_params, use_tqdm=False)
    assert [out.prompt_token_ids for out in wrapped] == ids


def test_nano_vllm_steps(model: str, llms: list[LLM]) -> None:
    llm = LLM(model, max_model_len=128)
    llms.append(llm)
    tokenizer: Any = llm.tokenizer
    chat = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    outputs = llm.generate(prompt, SamplingParams(max_tokens=4), use_tqdm=False)
    assert len(outputs) == 1


def test_vllm_basic_and_reproducible(model: str, llms: list[LLM]) -> None:
    texts = []
    for _ in range(2):
        llm = LLM(model=model, seed=42, trust_remote_code=False)
        llms.append(llm)
        sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
        outputs = llm.generate(PROMPTS, sampling_params)
        assert [output.prompt for output in outputs] == PROMPTS
        texts.append([output.outputs[0].text for output in outputs])
    assert texts[0] == texts[1]


def test_vllm_chat(model: str, llms: list[LLM]) -> None:
    llm = LLM(model=model)
    llms.append(llm)
    sampling_params = SamplingParams(max_tokens=4, temperature=None, top_p=None, top_k=None)  # type: ignore[arg-type]
    conversation: list[dict[str, Any]] = [
        {"role": "system", "content": "You write Python"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! What shall I write?"},
        {"role": "user", "content": [{"type": "text", "text": "A function"}]},
    ]
    (output,) = llm.chat(conversation, sampling_params, use_tqdm=False)
    assert "A function" in output.prompt
    outputs = llm.chat([conversation] * 3, sampling_params, use_tqdm=True)
    assert [one.prompt for one in outputs] == [output.prompt] * 3
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    outputs = llm.chat([conversation] * 2, sampling_params, use_tqdm=False, chat_template=template)
    assert outputs[0].prompt.startswith("You write PythonHello")


def test_vllm_generate_with_defaults_of_the_model(model: str, llms: list[LLM]) -> None:
    options: dict[str, Any] = {"model": model, "dtype": "float", "gpu_memory_utilization": 0.8}
    llm = LLM(**options)
    llms.append(llm)
    # vLLM's parameters can be changed later. Those of this engine are given at once.
    sampling_params = llm.get_default_sampling_params(max_tokens=4, temperature=0.5)
    outputs = llm.generate(PROMPTS, sampling_params=sampling_params)
    assert {len(output.outputs[0].token_ids) for output in outputs} == {4}


def test_vllm_prefix_caching(model: str, llms: list[LLM]) -> None:
    llm = LLM(model=model, enable_prefix_caching=True, kvcache_block_size=16)
    llms.append(llm)
    table = "".join(f"| {i} | person {i} |\n" for i in range(30))
    sampling_params = SamplingParams(temperature=0, max_tokens=5)
    first = llm.generate(f"{table}# 3", sampling_params=sampling_params)[0]
    second = llm.generate(f"{table}# 9", sampling_params=sampling_params)[0]
    assert first.outputs[0].text is not None
    assert first.metrics.cached_prompt_tokens == 0
    assert second.metrics.cached_prompt_tokens > 100


def test_vllm_logits_processors(model: str, llms: list[LLM]) -> None:
    class OnlyToken:
        """A request's own processor, as vLLM's adapter for them takes it."""

        def __init__(self, token: int) -> None:
            self.token = token

        def __call__(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            kept = logits[self.token].item()
            logits[:] = float("-inf")
            logits[self.token] = kept
            return logits

    llm = LLM(model=model)
    llms.append(llm)
    processors: list[Any] = [[OnlyToken(128)], None, [OnlyToken(67)], []]
    params = [
        SamplingParams(temperature=0.0, max_tokens=5, logits_processors=calls)
        for calls in processors
    ]
    outputs = llm.generate(PROMPTS, params)
    assert outputs[0].outputs[0].token_ids == [128] * 5
    assert outputs[2].outputs[0].token_ids == [67] * 5
    assert set(outputs[1].token_ids) != {128}


def test_vllm_profiling(model: str, llms: list[LLM]) -> None:
    """`start_profile` is torch's profiler here."""
    llm = LLM(model=model, tensor_parallel_size=1)
    llms.append(llm)
    with torch.profiler.profile() as profile:
        llm.generate(PROMPTS, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=3))
    assert "aten::index_select" in {event.key for event in profile.key_averages()}


def test_vllm_structured_outputs(model: str, llms: list[LLM]) -> None:
    pytest.importorskip("llguidance")
    llm = LLM(model=model, max_model_len=100)
    llms.append(llm)
    schema = {"enum": ["Positive", "Negative"]}
    outputs = llm.generate(
        prompts="x = ", sampling_params=SamplingParams(json_schema=schema, max_tokens=50)
    )
    assert outputs[0].outputs[0].text in ('"Positive"', '"Negative"')


def test_vllm_log_probabilities(model: str, llms: list[LLM]) -> None:
    llm = LLM(model=model)
    llms.append(llm)
    params = SamplingParams(
        temperature=0.0, logprobs=1, prompt_logprobs=1, logprobs_details=True, max_tokens=3
    )
    (output,) = llm.generate(PROMPTS[0], params)
    completion = output.outputs[0]
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry[token].logprob <= 0
        assert isinstance(entry[token].decoded_token, str)
    assert completion.cumulative_logprob <= 0


def test_vllm_engine_loop(model: str, llms: list[LLM]) -> None:
    llm = LLM(model=model)
    llms.append(llm)
    waiting = [
        ("import os", SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2, max_tokens=4)),
        ("class A", SamplingParams(n=2, temperature=0.8, top_p=0.95, max_tokens=4)),
    ]
    ended = 0
    while waiting or llm.has_unfinished:
        if waiting:
            llm.add_request(*waiting.pop(0))
        ended += sum(output.finished for output in llm.step())
    assert ended == 2


def test_transformers_inputs(model: str, llms: list[LLM]) -> None:
    """What goes into `model.generate(**inputs)`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = LLM(model, dtype=torch.float32)
    llms.append(llm)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    greedy = SamplingParams(temperature=0, max_tokens=4)
    texts = llm.generate(PROMPTS, greedy)
    outputs = llm.generate(inputs, greedy)
    assert [out.prompt_token_ids for out in outputs] == [out.prompt_token_ids for out in texts]
    (output,) = llm.generate(inputs["input_ids"][0], greedy)
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
