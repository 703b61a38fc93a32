"""What sampling parameters do to an engine's tokens, against transformers and against itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm import LLM, SamplingParams
from tests.checkpoints import Checkpoints, random_prompts
from utils.errors import LogitsError

PROMPTS = random_prompts([3, 20, 1, 33], seed=31)
DEPTHS = [0, 1]
# One of everything that does not end a request; some of it in every row of a batch.
SPECIAL: list[dict[str, Any]] = [
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.05, "repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.7, "top_k": 50},
    {"logits_processors": [lambda ids, logits: logits.index_fill(0, torch.tensor(7), -1e9)]},
    {"temperature": 0, "frequency_penalty": 1.1},
    {"temperature": 1.7, "top_p": 0.8, "min_p": 0.01, "logprobs": 2},
]


@pytest.fixture(scope="module")
def small(checkpoints: Checkpoints) -> Path:
    return checkpoints["qwen3-gqa2-wide-heads"]


@pytest.fixture(scope="module")
def model(small: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=DEPTHS, ids=["depth0", "depth1"])
def llm(small: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with _engine(small, pipeline_depth=request.param) as llm:
        yield llm


def _engine(path: Path, **options: Any) -> LLM:
    defaults = {"device": "cpu", "kvcache_block_size": 16, "max_num_seqs": 64, "max_model_len": 128}
    return LLM(path, **{**defaults, **options})


def _tokens(llm: LLM, prompts: Any, params: Any) -> list[list[int]]:
    return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]


def _special(index: int, **more: Any) -> SamplingParams:
    values = {"temperature": 0.9, "seed": 100 + index, "max_tokens": 24, "ignore_eos": True}
    return SamplingParams(**{**values, **SPECIAL[index % len(SPECIAL)], **more})


@pytest.mark.parametrize("penalty", [0.7, 1.2, 3.0])
def test_greedy_with_a_repetition_penalty_is_transformers_generate(
    llm: LLM, model: Any, penalty: float
) -> None:
    params = SamplingParams(
        temperature=0, repetition_penalty=penalty, max_tokens=30, ignore_eos=True
    )
    for prompt, tokens in zip(PROMPTS, _tokens(llm, PROMPTS, params), strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            min_new_tokens=30,
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        assert tokens == expected[0, len(prompt) :].tolist()


@torch.inference_mode()
def test_greedy_with_presence_and_frequency_penalties(llm: LLM, model: Any) -> None:
    """Against a loop over full forward passes, with the penalties as OpenAI's API defines them."""
    params = SamplingParams(
        temperature=0, presence_penalty=0.8, frequency_penalty=0.6, max_tokens=24, ignore_eos=True
    )
    for prompt, tokens in zip(PROMPTS, _tokens(llm, PROMPTS, params), strict=True):
        output: list[int] = []
        while len(output) < 24:
            logits = model(torch.tensor([prompt + output])).logits[0, -1]
            for token in set(output):
                logits[token] -= 0.8 + 0.6 * output.count(token)
            output.append(int(logits.argmax()))
        assert tokens == output


@pytest.mark.parametrize("index", range(len(SPECIAL)))
def test_alone_and_in_a_batch_of_64(llm: LLM, index: int) -> None:
    prompts = [PROMPTS[i % 4] for i in range(64)]
    # Every other request is a plain one.
    plain = SamplingParams(temperature=0.8, seed=3, max_tokens=20, ignore_eos=True)
    params = [plain if i % 2 else _special(i // 2) for i in range(64)]
    together = _tokens(llm, prompts, params)
    (alone,) = _tokens(llm, [prompts[2 * index]], _special(index))
    assert together[2 * index] == alone
    assert together[1] == _tokens(llm, [prompts[1]], plain)[0]


@pytest.mark.parametrize("depth", DEPTHS)
def test_after_preemption(llm: LLM, small: Path, depth: int) -> None:
    prompts = random_prompts([15, 14, 13, 16, 12, 11], seed=23)
    params = [_special(i, max_tokens=40) for i in range(6)]
    alone = [_tokens(llm, [p], s)[0] for p, s in zip(prompts, params, strict=True)]
    with _engine(small, num_kvcache_blocks=7, pipeline_depth=depth) as tight:
        seqs = [tight.engine.add_request(p, s) for p, s in zip(prompts, params, strict=True)]
        while tight.engine.has_unfinished:
            tight.engine.step()
    assert sum(seq.num_preemptions for seq in seqs) > 0
    assert [seq.output_token_ids for seq in seqs] == alone
    scored = seqs[5].logprobs
    assert [next(iter(entry)) for entry in scored] == seqs[5].output_token_ids


def test_prompts_in_chunks(llm: LLM, small: Path) -> None:
    params = [_special(i) for i in range(6)]
    prompts = random_prompts([60, 33, 47, 5, 60, 20], seed=24)
    with _engine(small, max_num_batched_tokens=11, max_num_seqs=6) as chunked:
        assert _tokens(chunked, prompts, params) == _tokens(llm, prompts, params)


@pytest.mark.parametrize("index", range(len(SPECIAL)))
def test_every_parameter_changes_something(llm: LLM, index: int) -> None:
    """The tests above would pass if it were dropped."""
    special = _special(index)
    plain = SamplingParams(
        temperature=special.temperature, seed=special.seed, max_tokens=24, ignore_eos=True
    )
    if special.logprobs is None:
        assert _tokens(llm, PROMPTS, special) != _tokens(llm, PROMPTS, plain)


def test_top_k_1_and_a_tiny_top_p_are_greedy(llm: LLM) -> None:
    greedy = _tokens(llm, PROMPTS, SamplingParams(temperature=0, ignore_eos=True))
    for values in ({"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-300}, {"min_p": 1.0}):
        assert _tokens(llm, PROMPTS, SamplingParams(ignore_eos=True, **values)) == greedy


def test_min_tokens_puts_the_end_off(llm: LLM) -> None:
    (free,) = _tokens(llm, [PROMPTS[1]], SamplingParams(temperature=0, ignore_eos=True))
    end = free[0]
    ends: dict[str, Any] = {"temperature": 0, "stop_token_ids": [end], "ignore_eos": True}
    (out,) = llm.generate([PROMPTS[1]], SamplingParams(**ends), use_tqdm=False)
    assert (out["token_ids"], out["finish_reason"]) == ([end], "stop")
    (later,) = _tokens(llm, [PROMPTS[1]], SamplingParams(**ends, min_tokens=5))
    assert end not in later[:5]
    assert len(later) >= 6 or later[-1] == end


@pytest.mark.parametrize("depth", DEPTHS)
def test_min_tokens_are_counted_from_the_prompt_after_a_preemption(small: Path, depth: int) -> None:
    """Requests whose only wish is to end, in a cache that holds two of three."""

    def wish(token_ids: list[int], logits: Tensor) -> Tensor:
        logits[9] += 1e4
        return logits

    params = SamplingParams(
        temperature=0, stop_token_ids=[9], min_tokens=30, max_tokens=60, logits_processors=[wish]
    )
    options: dict[str, Any] = {"kvcache_block_size": 16, "num_kvcache_blocks": 7}
    with LLM(small, device="cpu", pipeline_depth=depth, **options) as llm:
        outputs = llm.generate(random_prompts([20, 20, 20], seed=3), params, use_tqdm=False)
        assert llm.stats().preemptions > 0
    assert [len(out["token_ids"]) for out in outputs] == [31] * 3
    assert [out["token_ids"].index(9) for out in outputs] == [30] * 3


@pytest.mark.parametrize("min_tokens", [1, 5])
def test_min_tokens_is_exact_and_log_probabilities_are_the_models_own(
    llm: LLM, model: Any, min_tokens: int
) -> None:
    """A request alone, whose only wish is to end at once."""

    def wish(token_ids: list[int], logits: Tensor) -> Tensor:
        logits[9] += 1e4
        return logits

    params = SamplingParams(
        stop_token_ids=[9], min_tokens=min_tokens, logits_processors=[wish], logprobs=0, seed=1
    )
    (out,) = llm.generate([PROMPTS[1]], params, use_tqdm=False)
    assert len(out["token_ids"]) == min_tokens + 1
    assert out["token_ids"].index(9) == min_tokens
    expected = _reference_logprobs(model, PROMPTS[1], out["token_ids"])[19:]
    for i, (token, entry) in enumerate(zip(out["token_ids"], out["logprobs"], strict=True)):
        assert abs(entry[token] - float(expected[i, token])) <= 1e-4


def test_logits_processors_see_the_tokens_and_change_the_logits(llm: LLM) -> None:
    seen: list[list[int]] = []

    def next_number(token_ids: list[int], logits: Tensor) -> Tensor:
        assert logits.dtype == torch.float32
        seen.append(token_ids)
        return torch.full_like(logits, -1e9).index_fill(0, torch.tensor(len(token_ids)), 0.0)

    params = SamplingParams(logits_processors=[next_number], max_tokens=5, ignore_eos=True)
    plain = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    (alone,) = _tokens(llm, [PROMPTS[3]], plain)
    out = _tokens(llm, [PROMPTS[1], PROMPTS[3]], [params, plain])
    assert out == [[20, 21, 22, 23, 24], alone]
    assert seen[:3] == [PROMPTS[1], [*PROMPTS[1], 20], [*PROMPTS[1], 20, 21]]


@torch.inference_mode()
def _reference_logprobs(model: Any, prompt: list[int], output: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([prompt + output])).logits[0]
    return logits.log_softmax(1)


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_logprobs_are_those_of_a_full_forward_pass(llm: LLM, model: Any, num_top: int) -> None:
    params = [_special(i, logprobs=num_top, prompt_logprobs=num_top) for i in range(4)]
    for out in llm.generate(PROMPTS, params, use_tqdm=False):
        prompt, output = out["prompt_token_ids"], out["token_ids"]
        expected = _reference_logprobs(model, prompt, output)
        assert out["prompt_logprobs"][0] is None
        found = [*out["prompt_logprobs"][1:], *out["logprobs"]]
        assert len(found) == len(prompt) + len(output) - 1
        for i, (token, entry) in enumerate(zip((prompt + output)[1:], found, strict=True)):
            best = expected[i].topk(num_top).indices.tolist()
            assert list(entry) == [token, *(t for t in best if t != token)]
            for t, value in entry.items():
                assert abs(value - float(expected[i, t])) <= 1e-4


@pytest.mark.parametrize("depth", DEPTHS)
def test_prompt_logprobs_in_chunks_with_a_warm_cache_and_after_preemption(
    small: Path, model: Any, depth: int
) -> None:
    prompts = random_prompts([40, 37, 35], seed=25)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    scored = SamplingParams(
        temperature=0, max_tokens=30, ignore_eos=True, prompt_logprobs=0, logprobs=0
    )
    options: dict[str, Any] = {"max_num_batched_tokens": 16, "max_num_seqs": 3}
    with _engine(small, num_kvcache_blocks=11, pipeline_depth=depth, **options) as llm:
        plain = _tokens(llm, prompts, params)
        outputs = llm.generate(prompts, scored, use_tqdm=False)
        assert sum(out["metrics"]["preemptions"] for out in outputs) > 0
    for out, tokens in zip(outputs, plain, strict=True):
        assert out["token_ids"] == tokens
        expected = _reference_logprobs(model, out["prompt_token_ids"], tokens)
        found = [*out["prompt_logprobs"][1:], *out["logprobs"]]
        all_tokens = [*out["prompt_token_ids"], *tokens]
        assert len(found) == len(all_tokens) - 1
        for i, (token, entry) in enumerate(zip(all_tokens[1:], found, strict=True)):
            assert abs(entry[token] - float(expected[i, token])) <= 1e-4


def test_outputs_and_kinds_of_seed_never_share_noise(small: Path) -> None:
    """An unseeded request of an engine with seed 0, the outputs of a seed, and of the next seed."""
    free: dict[str, Any] = {"temperature": 3.0, "max_tokens": 12, "ignore_eos": True}
    with _engine(small, seed=0) as llm:
        unseeded = _tokens(llm, [PROMPTS[1]] * 6, SamplingParams(**free))
        seeded = []
        for seed in (0, 1):
            (out,) = llm.generate(PROMPTS[1], SamplingParams(n=4, seed=seed, **free), False)
            seeded.append([one["token_ids"] for one in out["outputs"]])
        assert len({tuple(tokens) for tokens in (*unseeded, *seeded[0], *seeded[1])}) == 14
        assert _tokens(llm, PROMPTS[1], SamplingParams(seed=1, **free)) == seeded[1][:1]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_broken_weights_fail_the_requests_that_meet_them(
    small: Path, tmp_path: Path, temperature: float
) -> None:
    """Token 5 has an embedding of NaN: no request that has it gets tokens, the others do."""
    broken = shutil.copytree(small, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=6, stop_token_ids=[5])
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8], [5]]
    for depth in DEPTHS:
        with _engine(broken, pipeline_depth=depth) as llm, _engine(small) as whole:
            good, bad, other, worse = llm.generate(prompts, params, use_tqdm=False)
            for out in (bad, worse):
                assert (out["finish_reason"], out["token_ids"]) == ("error", [])
                assert isinstance(out["error"], LogitsError)
            assert [good["token_ids"], other["token_ids"]] == _tokens(whole, prompts[::2], params)
            assert (good["error"], llm.has_unfinished) == (None, False)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_processor_that_leaves_no_choice_fails_its_request_alone(llm: LLM, value: float) -> None:
    """Also with penalties, filters and log-probabilities in the same rows."""

    def spoil(token_ids: list[int], logits: Tensor) -> Tensor:
        return logits if len(token_ids) < 7 else torch.full_like(logits, value)

    spoiled = [
        SamplingParams(max_tokens=9, logits_processors=[spoil], seed=2, ignore_eos=True, **more)
        for more in ({}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5, "logprobs": 2, "n": 2})
    ]
    plain = SamplingParams(temperature=0.7, seed=5, max_tokens=9, ignore_eos=True)
    (expected,) = _tokens(llm, PROMPTS[0], plain)
    outputs = llm.generate([PROMPTS[0], *[[1, 2, 3, 4]] * 3], [plain, *spoiled], False)
    assert outputs[0]["token_ids"] == expected
    for out in (*outputs[1:3], *outputs[3]["outputs"]):
        assert (out["finish_reason"], len(out["token_ids"])) == ("error", 3)
        assert isinstance(out["error"], LogitsError)
    assert [len(scores) in (2, 3) for scores in outputs[3]["logprobs"]] == [True] * 3
