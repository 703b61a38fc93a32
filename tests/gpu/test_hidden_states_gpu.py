"""Hidden states on a GPU: equal bits in any company, with CUDA graphs and without."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.graphs import StepGraphs
from engine.types import StepPlan
from llm import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL: dict[str, Any] = {"max_num_seqs": 48, "num_kvcache_blocks": 300, "max_model_len": 1024}
LENGTHS = (1, 7, 40, 300, 700)
LAYERS: tuple[int | str, ...] = ("last", 0, 1, "last", 2)


def prompts() -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(4096) for _ in range(length)] for length in LENGTHS]


def params(layer: int | str | None, num_tokens: int = 20) -> SamplingParams:
    return SamplingParams(
        temperature=0.8, seed=4, max_tokens=num_tokens, ignore_eos=True, hidden_states=layer
    )


def bits(out: dict[str, Any]) -> tuple[list[int], list[int]]:
    states = out["hidden_states"]
    return out["token_ids"], states.view(torch.int16).flatten().tolist()


def alone(llm: LLM) -> list[Any]:
    found = []
    for prompt, layer in zip(prompts(), LAYERS, strict=True):
        llm.reset_prefix_cache()
        found.append(bits(llm.generate([prompt], params(layer), use_tqdm=False)[0]))
    return found


def test_bits_are_equal_in_any_company(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[StepPlan] = []
    replay = StepGraphs.replay

    def counted(self: StepGraphs, plan: StepPlan) -> Any:
        replays.append(plan)
        return replay(self, plan)

    monkeypatch.setattr(StepGraphs, "replay", counted)
    with LLM(shipped, **SMALL) as llm:
        expected = alone(llm)
        # All decodes of the last layer alone ran as graphs.
        assert sum(len(plan.decode) for plan in replays if not plan.prefill) >= 2 * 18
        rng = random.Random(3)
        others = [[rng.randrange(4096) for _ in range(rng.choice([1, 90, 400]))] for _ in range(30)]
        plain = llm.generate(others, params(None), use_tqdm=False)
        for _ in range(2):
            llm.reset_prefix_cache()
            kinds = [params(layer) for layer in LAYERS] + [params(None)] * len(others)
            outputs = llm.generate(prompts() + others, kinds, use_tqdm=False)
            assert [bits(out) for out in outputs[: len(LAYERS)]] == expected
            got = [out["token_ids"] for out in outputs[len(LAYERS) :]]
            assert got == [out["token_ids"] for out in plain]
    for options in ({"enforce_eager": True}, {"max_num_batched_tokens": 64}, {"pipeline_depth": 0}):
        with LLM(shipped, **{**SMALL, **options}) as llm:
            kinds = [params(layer) for layer in LAYERS]
            outputs = llm.generate(prompts(), kinds, use_tqdm=False)
            assert [bits(out) for out in outputs] == expected, options


def test_they_are_those_of_transformers(shipped: Path, reference: Any) -> None:
    with LLM(shipped, **SMALL) as llm:
        layers = llm.engine.runner.hidden_layers
        outputs = llm.generate(prompts(), [params(one) for one in LAYERS], use_tqdm=False)
    for out, layer in zip(outputs, LAYERS, strict=True):
        ids = [*out["prompt_token_ids"], *out["token_ids"]]
        with torch.inference_mode():
            found = reference(torch.tensor([ids], device="cuda"), output_hidden_states=True)
        wanted = found.hidden_states[layers if layer == "last" else layer][0, : len(ids) - 1]
        got = out["hidden_states"].float()
        assert got.shape == wanted.shape
        error = (got - wanted.float().cpu()).norm(dim=-1) / wanted.float().cpu().norm(dim=-1)
        assert float(error.max()) < 0.05


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks_keep_their_bits(shipped: Path) -> None:
    with LLM(shipped, tensor_parallel_size=2, **SMALL) as llm:
        expected = alone(llm)
        llm.reset_prefix_cache()
        kinds = [params(layer) for layer in LAYERS]
        assert [bits(out) for out in llm.generate(prompts(), kinds, use_tqdm=False)] == expected
