"""Hidden states of every layer are those of transformers, however the tokens were computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.hidden_rows import layer_of
from llm import LLM, SamplingParams
from tests.checkpoints import Checkpoints
from utils.errors import RequestError

PROMPTS = [[5 * i + j for j in range(n)] for i, n in enumerate((1, 15, 31, 63))]
SMALL: dict[str, Any] = {"device": "cpu", "max_num_seqs": 8, "max_model_len": 128}


def reference(path: Any, token_ids: list[int]) -> tuple[torch.Tensor, ...]:
    """transformers' hidden states [n, hidden_size] of each layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
    return tuple(one[0] for one in found)


def params(layer: int | str | None, **others: Any) -> SamplingParams:
    asked = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, **others}
    return SamplingParams(hidden_states=layer, **asked)


def check(path: Any, out: dict[str, Any], layer: int, start: int = 0) -> None:
    ids = [*out["prompt_token_ids"], *out["token_ids"]]
    expected = reference(path, ids)[layer][start : max(len(ids) - 1, len(out["prompt_token_ids"]))]
    assert out["hidden_states"].shape == expected.shape
    torch.testing.assert_close(out["hidden_states"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3-gqa6", "llama-tied", "olmo2", "gemma3", "granite"])
def test_every_layer_is_that_of_transformers(checkpoints: Checkpoints, name: str) -> None:
    path = checkpoints[name]
    with LLM(path, **SMALL) as llm:
        layers = llm.engine.runner.hidden_layers
        asked: list[int | str] = [*range(layers + 1), "last", -1, -layers - 1]
        outputs = llm.generate(
            [PROMPTS[1]] * len(asked), [params(one) for one in asked], use_tqdm=False
        )
    for one, out in zip(asked, outputs, strict=True):
        check(path, out, layer_of(one, layers))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16},
        {"pipeline_depth": 1},
        {"kvcache_block_size": 16, "num_kvcache_blocks": 9},
        {"kvcache_block_size": 16, "max_num_batched_tokens": 24, "pipeline_depth": 1},
    ],
    ids=str,
)
def test_however_tokens_are_computed(checkpoints: Checkpoints, options: dict[str, Any]) -> None:
    """Beside requests that want other layers or none; twice, so that prefixes are cached."""
    path = checkpoints["qwen3-gqa6"]
    with LLM(path, **SMALL, **options) as llm:
        last = llm.engine.runner.hidden_layers
        kinds = [params("last"), params(1, hidden_states_start=3), params(None), params(0)]
        for _ in range(2):
            outputs = llm.generate(PROMPTS, kinds, use_tqdm=False)
            check(path, outputs[0], last)
            check(path, outputs[1], 1, 3)
            assert outputs[2]["hidden_states"] is None
            check(path, outputs[3], 0)
        if "num_kvcache_blocks" in options:
            assert llm.stats().preemptions > 0


def test_prompts_beside_decodes(checkpoints: Checkpoints) -> None:
    """A step has rows of the last layer from chunks, with a draw and without, and from decodes."""
    path = checkpoints["qwen3-gqa6"]
    with LLM(path, **SMALL, max_num_batched_tokens=16) as llm:
        outputs = []
        for prompt in PROMPTS:
            llm.add_request(prompt, params("last", max_tokens=9))
            outputs += llm.step()
        while llm.has_unfinished:
            outputs += llm.step()
        last = llm.engine.runner.hidden_layers
    assert len(outputs) == len(PROMPTS)
    for out in outputs:
        check(path, out, last)


def test_nothing_is_taken_from_the_cache_from_the_first_position_on(
    checkpoints: Checkpoints,
) -> None:
    path = checkpoints["qwen3-gqa6"]
    prompt = list(range(64))
    with LLM(path, kvcache_block_size=16, **SMALL) as llm:
        llm.generate([prompt], params(None), use_tqdm=False)
        for start, cached in ((0, 0), (15, 0), (16, 16), (40, 32), (63, 48), (64, 63), (70, 63)):
            [out] = llm.generate([prompt], params("last", hidden_states_start=start, max_tokens=8))
            assert out["metrics"]["cached_prompt_tokens"] == cached
            check(path, out, llm.engine.runner.hidden_layers, start)


def test_outputs_that_end_early(checkpoints: Checkpoints) -> None:
    path = checkpoints["qwen3-gqa6"]
    with LLM(path, **SMALL) as llm:
        last = llm.engine.runner.hidden_layers
        [out] = llm.generate([PROMPTS[2]], params("last", max_tokens=1))
        check(path, out, last)
        [out] = llm.generate([PROMPTS[2]], params("last"))
        stop = out["token_ids"][2]
        [cut] = llm.generate([PROMPTS[2]], params("last", stop_token_ids=[stop]))
        check(path, cut, last)
        assert torch.equal(cut["hidden_states"], out["hidden_states"][: len(cut["hidden_states"])])
        outputs = llm.generate([PROMPTS[2]], params("last", n=3))[0]["outputs"]
        for one in outputs:
            check(path, {**outputs[0], "prompt_token_ids": PROMPTS[2], **one}, last)


def test_tokens_after_a_stop_string_have_none(shipped: Any) -> None:
    with LLM(shipped, device="cpu", pipeline_depth=1, max_model_len=128) as llm:
        whole = params("last", max_tokens=30)
        [out] = llm.generate(["def add(a, b):"], whole)
        stop = out["text"].strip()[:3]
        [cut] = llm.generate(["def add(a, b):"], params("last", max_tokens=30, stop=stop))
        assert cut["finish_reason"] == "stop"
        count = len(cut["prompt_token_ids"]) + len(cut["token_ids"]) - 1
        assert len(cut["hidden_states"]) == count


def test_bad_layers_are_refused_and_nothing_is_lost(checkpoints: Checkpoints) -> None:
    with LLM(checkpoints["qwen3-gqa6"], **SMALL) as llm:
        layers = llm.engine.runner.hidden_layers
        for layer in (layers + 1, -layers - 2):
            with pytest.raises(RequestError, match=f"hidden_states={layer}: the model has"):
                llm.generate([[1]], params(layer))
        for value in ("first", 1.5, True):
            with pytest.raises(RequestError, match="hidden_states"):
                params(value)  # type: ignore[arg-type]
        assert len(llm.generate([[1]], params(layers))[0]["hidden_states"]) == 6
    with (
        LLM(checkpoints["qwen3-gqa6"], model_runner="fake", **SMALL) as llm,
        pytest.raises(RequestError, match="the runner returns none"),
    ):
        llm.generate([[1]], params("last"))


@pytest.mark.slow
def test_in_two_ranks(checkpoints: Checkpoints) -> None:
    path = checkpoints["qwen3-gqa6"]
    with LLM(path, tensor_parallel_size=2, **SMALL) as llm:
        last = llm.engine.runner.hidden_layers
        outputs = llm.generate(PROMPTS[1:3], [params("last"), params(1)], use_tqdm=False)
    check(path, outputs[0], last)
    check(path, outputs[1], 1)


def test_what_no_step_has_computed_is_an_empty_tensor(checkpoints: Checkpoints) -> None:
    with LLM(checkpoints["qwen3-gqa6"], **SMALL) as llm:
        for start, num_tokens in ((15, 0), (15, 1), (40, 6)):
            asked = params("last", hidden_states_start=start, max_tokens=num_tokens)
            [out] = llm.generate([PROMPTS[1]], asked, use_tqdm=False)
            assert out["hidden_states"].shape == (0, 96)
            assert out["hidden_states"].dtype == torch.float32


def test_a_request_that_fails_has_those_of_its_prompt(checkpoints: Checkpoints) -> None:
    """However many chunks the prompt has; also the log-probabilities of an aborted request fit."""
    path = checkpoints["qwen3-gqa6"]
    for budget in (16, 100):
        with LLM(path, max_num_batched_tokens=budget, **SMALL) as llm:
            broken = params(1, logits_processors=(fails,))
            [out] = llm.generate([PROMPTS[3]], broken, use_tqdm=False)
            assert out["finish_reason"] == "error"
            check(path, out, 1)


def fails(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    raise ValueError("no")


@pytest.mark.parametrize("depth", [0, 1])
def test_an_aborted_request_has_what_was_committed(checkpoints: Checkpoints, depth: int) -> None:
    path = checkpoints["qwen3-gqa6"]
    with LLM(path, max_num_batched_tokens=16, pipeline_depth=depth, **SMALL) as llm:
        request_id = llm.add_request(PROMPTS[3], params(1, prompt_logprobs=0))
        outputs = llm.step()
        llm.abort(request_id)
        while llm.has_unfinished:
            outputs += llm.step()
        [out] = outputs
        assert len(out["hidden_states"]) == 16
        assert len(out["prompt_logprobs"]) == 17


def test_the_last_part_of_a_stream_has_them(checkpoints: Checkpoints) -> None:
    path = checkpoints["qwen3-gqa6"]
    with LLM(path, **SMALL) as llm:
        asked = params("last", prompt_logprobs=1)
        [out] = llm.generate([PROMPTS[2]], asked, use_tqdm=False)
        llm.reset_prefix_cache()
        *parts, last = llm.stream([PROMPTS[2]], asked)
    assert not any("hidden_states" in part for part in parts)
    assert torch.equal(last["hidden_states"], out["hidden_states"])
    assert last["prompt_logprobs"] == out["prompt_logprobs"]
