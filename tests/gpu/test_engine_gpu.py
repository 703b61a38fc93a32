"""The whole engine on a CUDA device: backends, graphs, memory.

The memory tests read the whole device's use: run them while nothing else allocates on it, so not
in several test processes at once.
"""

from __future__ import annotations

import gc
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.model_runner import StepPass
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from engine.types import StepPlan, StepResult
from llm import LLM, SamplingParams
from tests.test_readme import check_structured_outputs
from utils.errors import ConfigError, OutOfMemoryError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

TINY = Path(__file__).parents[2] / "assets" / "qwen3-tiny-python"
# Two roundings to bf16 of nearly equal logits may change their order; in units of the logits'
# standard deviation.
TIE = 0.1
SMALL: dict[str, Any] = {"num_kvcache_blocks": 64, "max_num_seqs": 16}


def random_prompts(count: int, longest: int) -> list[list[int]]:
    rng = random.Random()
    return [[rng.randrange(3, 4096) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(llm: LLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]


@torch.inference_mode()
def worst_gap(reference: Any, prompts: list[list[int]], outputs: list[list[int]]) -> float:
    """How far a token is from the reference's best after the same tokens, in deviations."""
    worst = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt + output[:-1]], device="cuda")
        logits = reference(ids).logits[0, len(prompt) - 1 :].float()
        chosen = logits.gather(1, torch.tensor(output, device="cuda")[:, None])[:, 0]
        worst = max(worst, float(((logits.amax(1) - chosen) / logits.std(1)).max()))
    return worst


@pytest.mark.parametrize(
    "options",
    [
        {"attention_backend": "torch", "enforce_eager": True},
        {"enforce_eager": True},
        {},
        {"pipeline_depth": 0},
        {"kvcache_block_size": 16, "num_kvcache_blocks": 1024},
        {"max_num_seqs": 3, "num_kvcache_blocks": 5},
        {"max_num_batched_tokens": 48},
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_transformers(reference: Any, options: dict[str, Any]) -> None:
    prompts = random_prompts(12, 500)
    with LLM(TINY, **{**SMALL, **options}) as llm:
        outputs = greedy(llm, prompts, 48)
    assert worst_gap(reference, prompts, outputs) < TIE


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="on other GPUs products depend on the number of rows",
)
def test_graphs_give_the_bits_of_eager_steps() -> None:
    prompts = random_prompts(16, 60)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=2)
    found = []
    for eager in (True, False):
        with LLM(TINY, enforce_eager=eager, **SMALL) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([(out["token_ids"], out["logprobs"]) for out in outputs])
    assert found[0] == found[1]


def test_a_seeded_request_gives_the_same_tokens_alone_and_in_a_batch() -> None:
    prompts = random_prompts(16, 100)
    params = SamplingParams(temperature=0.8, max_tokens=24, ignore_eos=True, seed=11)
    with LLM(TINY, dtype="float32", attention_backend="torch", **SMALL) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        alone = llm.generate(prompts[5], params, use_tqdm=False)
    assert together[5]["token_ids"] == alone[0]["token_ids"]


def test_special_requests_beside_plain_ones_in_captured_steps(reference: Any) -> None:
    """All of them greedy by one way or another; a call replays what the one before captured."""
    prompts = random_prompts(16, 100)
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"top_k": 1},
        {"min_p": 1.0},
        {"temperature": 0, "logprobs": 2, "prompt_logprobs": 0},
        {
            "temperature": 0,
            "logit_bias": {5: 0.0},
            "bad_words_ids": [[4000, 4001], [5, 4003]],
        },
        {"temperature": 0, "allowed_token_ids": list(range(4096)), "min_tokens": 3},
    ]
    params = [SamplingParams(max_tokens=24, ignore_eos=True, **ways[i % 6]) for i in range(16)]
    with LLM(TINY, **SMALL) as llm:
        for count in (16, 16, 8, 2):
            llm.reset_prefix_cache()
            outputs = llm.generate(prompts[:count], params[:count], use_tqdm=False)
            tokens = [out["token_ids"] for out in outputs]
            assert worst_gap(reference, prompts[:count], tokens) < TIE
            for out in outputs[3::6]:
                assert [next(iter(entry)) for entry in out["logprobs"]] == out["token_ids"]
                assert len(out["prompt_logprobs"]) == len(out["prompt_token_ids"])


@pytest.mark.parametrize("depth", [0, 1])
def test_requests_that_enter_and_leave_run_as_graphs_alone(
    reference: Any, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    prompts = random_prompts(60, 200)
    rng = random.Random(5)
    # Greedy by two ways, one of which needs the logits.
    ways: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"top_k": 1})
    params = [
        SamplingParams(max_tokens=rng.randint(1, 40), ignore_eos=True, **way) for way in ways * 30
    ]
    with LLM(TINY, pipeline_depth=depth, **SMALL) as llm:

        def no_launches(*_: Any) -> None:
            raise AssertionError("a step ran kernel by kernel")

        monkeypatch.setattr(StepPass, "forward", no_launches)
        for chosen in (slice(0, 60, 2), slice(60)):
            outputs = llm.generate(prompts[chosen], params[chosen], use_tqdm=False)
            tokens = [out["token_ids"] for out in outputs]
            assert worst_gap(reference, prompts[chosen], tokens) < TIE


def test_two_engines_share_one_device(reference: Any) -> None:
    prompts = random_prompts(4, 100)
    with LLM(TINY, **SMALL) as one, LLM(TINY, enforce_eager=True, **SMALL) as two:
        for llm in (one, two, one):
            assert worst_gap(reference, prompts, greedy(llm, prompts, 16)) < TIE


def test_close_returns_the_memory() -> None:
    """From the second engine on: the first one's kernels stay loaded, for the process to reuse."""
    left = []
    for _ in range(3):
        before = torch.cuda.mem_get_info()[0]
        llm = LLM(TINY, gpu_memory_utilization=0.3)
        greedy(llm, random_prompts(20, 300), 20)
        assert before - torch.cuda.mem_get_info()[0] > 1 << 30
        llm.close()
        left.append((before - torch.cuda.mem_get_info()[0]) >> 20)
    assert max(left[1:]) <= 50, f"{left} MiB left, {torch.cuda.memory_reserved() >> 20} by torch"


def test_gpu_memory_utilization_is_honoured() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before, total = torch.cuda.mem_get_info()
    with LLM(TINY, gpu_memory_utilization=0.5) as llm:
        greedy(llm, random_prompts(200, 300), 8)
        used = before - torch.cuda.mem_get_info()[0]
    assert abs(used / total - 0.5) < 0.02


def test_too_little_memory_is_an_error_with_the_numbers() -> None:
    with pytest.raises(OutOfMemoryError, match="GiB"):
        LLM(TINY, gpu_memory_utilization=0.001)
    with pytest.raises(OutOfMemoryError, match="blocks"):
        LLM(TINY, num_kvcache_blocks=10**8)


def test_graphs_that_cannot_be_captured_are_refused() -> None:
    with pytest.raises(ConfigError, match="enable_cuda_graphs"):
        LLM(TINY, attention_backend="torch", enable_cuda_graphs=True)


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=str)
def test_the_device_s_time_of_a_step_is_told_if_it_is_asked_for(options: dict[str, Any]) -> None:
    found: list[tuple[bool, float | None]] = []

    class AsksEveryOther(ContinuousScheduler):
        name = "asks_every_other"

        def schedule(self) -> StepPlan | None:
            plan = super().schedule()
            return plan and replace(plan, timed=plan.step_id % 2 == 0)

        def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
            found.append((plan.timed, result.device_seconds))
            return super().commit(plan, result)

    with LLM(TINY, scheduler=AsksEveryOther, **SMALL, **options) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=20, ignore_eos=True), use_tqdm=False)
    assert len(found) >= 20
    for timed, seconds in found:
        assert (seconds is not None and seconds > 0) == timed


@pytest.mark.parametrize("depth", [0, 1])
def test_structured_outputs(depth: int) -> None:
    """The examples of docs/structured-output.md."""
    pytest.importorskip("llguidance")
    pytest.importorskip("xgrammar")
    check_structured_outputs(TINY, device="cuda", pipeline_depth=depth, **SMALL)


@pytest.mark.parametrize("options", [{}, {"pipeline_depth": 0}, {"enforce_eager": True}])
def test_threads_share_the_engine_and_lose_nothing(options: dict[str, Any]) -> None:
    """Tokens may differ in the last bits of their logits, so their numbers are compared."""

    def use(llm: LLM, rng: random.Random) -> None:
        for _ in range(30):
            count = rng.randint(1, 30)
            params = SamplingParams(seed=rng.randrange(99), max_tokens=count, ignore_eos=True)
            (prompt,) = random_prompts(1, 60)
            match rng.randrange(4):
                case 0:
                    (out,) = llm.generate([prompt], params, use_tqdm=False)
                    assert (len(out["token_ids"]), out["finish_reason"]) == (count, "length")
                case 1:
                    parts = list(llm.stream(prompt, params))
                    assert sum(len(part["token_ids"]) for part in parts) == count
                case 2:
                    stream = llm.stream([prompt] * 2, params)
                    next(stream)
                    stream.close()
                case 3:
                    llm.abort(llm.add_request(prompt, params))

    with LLM(TINY, **SMALL, **options) as llm:
        with ThreadPoolExecutor(6) as pool:
            for one in [pool.submit(use, llm, random.Random(i)) for i in range(6)]:
                one.result(120)
        while llm.has_unfinished:
            llm.step()
        stats = llm.stats()
        assert (stats.unfinished_requests, stats.num_free_blocks) == (0, stats.num_blocks)
