"""`logit_bias`, `allowed_token_ids` and bad words, by their definitions on transformers' logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.bad_words import with_bad_words_ids
from engine.llm_engine import LLMEngine
from llm import LLM, SamplingParams
from tests.checkpoints import Checkpoints, random_prompts
from utils.errors import LogitsError, RequestError

PROMPTS = random_prompts([5, 21, 40], seed=7)
LENGTH = 12


@pytest.fixture(scope="module")
def small(checkpoints: Checkpoints) -> Path:
    return checkpoints["qwen3-gqa2-wide-heads"]


@pytest.fixture(scope="module")
def model(small: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def free(model: Any) -> list[list[int]]:
    """The tokens without any option."""
    return [_reference(model, prompt, SamplingParams()) for prompt in PROMPTS]


@pytest.fixture(scope="module", params=[0, 1], ids=["depth0", "depth1"])
def llm(shipped: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(shipped, device="cpu", max_model_len=256, pipeline_depth=request.param) as llm:
        yield llm


@torch.inference_mode()
def _reference(model: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    """Greedy tokens, one full forward pass for each."""
    output: list[int] = []
    for _ in range(LENGTH):
        logits = model(torch.tensor([prompt + output])).logits[0, -1]
        for token, bias in dict(params.logit_bias or ()).items():
            logits[token] += bias
        for token in set(prompt + output):
            by = params.repetition_penalty
            logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
        if params.allowed_token_ids is not None:
            forbidden = torch.ones_like(logits, dtype=torch.bool)
            forbidden[list(params.allowed_token_ids)] = False
            logits[forbidden] = float("-inf")
        for *before, last in params.bad_words_ids:
            if output[len(output) - len(before) :] == before and len(before) <= len(output):
                logits[last] = float("-inf")
        output.append(int(logits.argmax()))
    return output


def _options(free: list[list[int]]) -> list[dict[str, Any]]:
    """Options that change the free outputs: each names some of their tokens."""
    first, second, third = free
    return [
        {"logit_bias": {first[3]: -100, 11: 1.5, second[0]: -2.25}},
        {"logit_bias": {first[2]: 3.0, 40: -0.5}, "repetition_penalty": 1.4},
        {"allowed_token_ids": list(range(50, 90))},
        {"bad_words_ids": [first[1:3], second[4:7], [third[0]], [*third[1:4], 5]]},
        {"bad_words_ids": [[token] for token in first], "allowed_token_ids": list(range(200))},
    ]


def _params(options: dict[str, Any], **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, **options, **more)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_blocks", [100, 9], ids=["ample", "preempting"])
def test_greedy_tokens_are_those_of_the_definitions(
    small: Path, model: Any, free: list[list[int]], depth: int, num_blocks: int
) -> None:
    """All prompts with all options in one batch, with log-probabilities of the raw logits."""
    options: dict[str, Any] = {"kvcache_block_size": 16, "max_num_batched_tokens": 64}
    cases = [(p, kind, i) for i, p in enumerate(PROMPTS) for kind in _options(free)]
    params = [_params(kind, logprobs=1) for _, kind, _ in cases]
    with LLM(
        small,
        device="cpu",
        max_model_len=128,
        max_num_seqs=16,
        num_kvcache_blocks=num_blocks,
        pipeline_depth=depth,
        **options,
    ) as llm:
        outputs = llm.generate([prompt for prompt, *_ in cases], params, use_tqdm=False)
        assert (llm.stats().preemptions > 0) == (num_blocks == 9)
    changed = 0
    for (prompt, _, i), one, out in zip(cases, params, outputs, strict=True):
        assert out["token_ids"] == _reference(model, prompt, one)
        changed += out["token_ids"] != free[i]
        raw = model(torch.tensor([prompt + out["token_ids"]])).logits[0, len(prompt) - 1 : -1]
        expected = raw.detach().log_softmax(1)
        for k, (token, entry) in enumerate(zip(out["token_ids"], out["logprobs"], strict=True)):
            assert abs(entry[token] - float(expected[k, token])) <= 1e-4
    assert changed > len(cases) // 2


def test_each_of_n_outputs_keeps_its_own_words(llm: LLM) -> None:
    """A word is bad where the output ends with its beginning, which differs between outputs."""
    free = SamplingParams(temperature=1.5, seed=3, n=6, max_tokens=20, ignore_eos=True)
    (out,) = llm.generate(["def"], free, use_tqdm=False)
    pairs = [one["token_ids"][5:7] for one in out["outputs"]]
    params = SamplingParams(
        temperature=1.5, seed=3, n=6, max_tokens=20, ignore_eos=True, bad_words_ids=pairs
    )
    (again,) = llm.generate(["def"], params, use_tqdm=False)
    for before, after in zip(out["outputs"], again["outputs"], strict=True):
        assert after["token_ids"][:6] == before["token_ids"][:6]
        assert after["token_ids"][6] != before["token_ids"][6]
        assert not [i for i in range(19) if after["token_ids"][i : i + 2] in pairs]


def test_the_prompt_completes_no_bad_word(llm: LLM) -> None:
    params = _params({})
    (tokens,) = (out["token_ids"] for out in llm.generate([[5, 9]], params, use_tqdm=False))
    for words, same in (([[9, tokens[0]]], True), ([[tokens[0], tokens[1]]], False)):
        (out,) = llm.generate([[5, 9]], _params({"bad_words_ids": words}), use_tqdm=False)
        assert (out["token_ids"] == tokens) == same


def test_a_bad_word_is_not_in_the_text(llm: LLM) -> None:
    """Neither at the beginning of a line nor after a space."""
    prompt = "import os\n\n\ndef main():\n"
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    (out,) = llm.generate([prompt], params, use_tqdm=False)
    words = sorted({word for word in out["text"].split() if word.isalpha()})
    assert len(words) >= 2
    (without,) = llm.generate(
        [prompt],
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, bad_words=words),
        use_tqdm=False,
    )
    assert without["token_ids"] != out["token_ids"]
    ids = without["token_ids"]
    for word in words:
        for text in (word, " " + word):
            bad = llm.tokenizer.encode(text, add_special_tokens=False)  # type: ignore[union-attr]
            assert not [i for i in range(60) if ids[i : i + len(bad)] == bad]


def test_bad_words_are_encoded_with_and_without_a_space() -> None:
    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            assert not add_special_tokens
            return [] if text.strip() == "none" else [ord(c) for c in text]

    params = SamplingParams(bad_words=["a", " bc"], bad_words_ids=[[5], [97]])
    found = with_bad_words_ids(params, Tokenizer())
    assert found.bad_words == ()
    assert found.bad_words_ids == ((5,), (97,), (32, 97), (98, 99), (32, 98, 99))
    plain = SamplingParams(bad_words_ids=[[5]])
    assert with_bad_words_ids(plain, None) is plain
    for words, tokenizer, message in (
        (["a"], None, "no tokenizer"),
        (["none"], Tokenizer(), "no tokens"),
        (["a" * 33], Tokenizer(), "too many tokens"),
        ([chr(0x4E00 + i) for i in range(300)], Tokenizer(), "too many tokens"),
        (["a"], object(), "refuses"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            with_bad_words_ids(SamplingParams(bad_words=words), tokenizer)
        assert caught.value.field == "bad_words"


def test_an_engine_without_a_tokenizer_refuses_bad_words(llm: LLM) -> None:
    engine: LLMEngine = llm.engine
    with pytest.raises(RequestError, match="bad_words_ids") as caught:
        engine.add_request([1], SamplingParams(bad_words=["a"]))
    assert caught.value.field == "bad_words"
    assert not engine.has_unfinished


def test_a_request_whose_options_leave_no_token_fails_alone(llm: LLM) -> None:
    none = _params({"allowed_token_ids": [5, 6], "bad_words_ids": [[5], [6, 6], [6, 6, 5]]})
    good, bad = llm.generate([[1, 2], [1, 2]], [_params({}), none], use_tqdm=False)
    assert (good["finish_reason"], len(good["token_ids"])) == ("length", LENGTH)
    # 5 is forbidden, so 6 comes first, after which nothing is left.
    assert (bad["finish_reason"], bad["token_ids"]) == ("error", [6])
    assert isinstance(bad["error"], LogitsError)


def test_a_bias_of_100_decides_and_one_of_minus_100_forbids(llm: LLM) -> None:
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            temperature=temperature, max_tokens=5, logit_bias={7: 100}, ignore_eos=True
        )
        assert llm.generate([[1]], params, use_tqdm=False)[0]["token_ids"] == [7] * 5
