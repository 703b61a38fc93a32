"""A request's tokens and log-probabilities are the same to the bit whatever else runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import random_weights
from layers.attention.triton_paged import TritonAttention
from llm import LLM, SamplingParams
from tests.checkpoints import VARIANTS, VOCAB_SIZE, write_checkpoint
from tests.test_readme import code_of, run
from utils.errors import ConfigError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a CUDA device of compute capability 9.0",
    ),
]

COUNT = 24
BASE: dict[str, Any] = {"max_num_seqs": 48, "num_kvcache_blocks": 300, "max_model_len": 1024}
# An odd vocabulary, and numbers of heads that are no powers of two.
ODD = {
    **random_weights.SHAPES["qwen3-0.6b"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49155,
    "eos_token_id": 1,
}
SHAPES = {
    "qwen3-0.6b": {**random_weights.SHAPES["qwen3-0.6b"], "num_hidden_layers": 3},
    "qwen2-1.5b": {**random_weights.SHAPES["qwen2-1.5b"], "num_hidden_layers": 2},
    "qwen3-8b": {**random_weights.SHAPES["qwen3-8b"], "num_hidden_layers": 1},
    "odd": {**ODD, "num_hidden_layers": 3},
}
# A variant of each family with other layers than Qwen's, of sizes that the kernels take.
FAMILIES = (
    *("llama-bias", "mistral", "ministral", "ministral3", "smollm3-nope", "phi3", "granite"),
    *("olmo2", "olmo3", "gemma3"),
    *("mistral-window", "qwen3-windows", "smollm3-windows", "olmo3-windows", "gemma3-windows"),
)
# OLMo norms queries over all heads, which the ranks would have to share. 2 divides no 9 heads.
ONE_RANK = ("olmo2", "olmo3", "odd")
Bits = tuple[list[int], Any]


class Requests:
    """Requests of all kinds, and what each of them gives alone."""

    def __init__(self, name: str, model: Path, vocab_size: int) -> None:
        rng = random.Random(1)
        self.name, self.model, self.vocab_size = name, model, vocab_size
        # If all layers have windows, requests give back as many blocks as they take.
        self.preempts = name != "mistral-window"
        self.prompts = [
            [rng.randrange(vocab_size) for _ in range(rng.choice([1, 7, 40, 130, 300, 700]))]
            for _ in range(COUNT)
        ]
        kinds: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 0.8, "seed": 3},
            {"temperature": 0, "logprobs": 3},
            {"temperature": 1.0, "seed": 4, "top_p": 0.9, "logprobs": 2},
            {"temperature": 0.9, "seed": 5, "top_k": 40, "repetition_penalty": 1.1},
            {"temperature": 0.9, "seed": 6, "min_p": 0.01, "presence_penalty": 0.5},
        ]
        self.params = [
            SamplingParams(max_tokens=rng.randint(8, 40), ignore_eos=True, **kinds[i % len(kinds)])
            for i in range(COUNT)
        ]
        with LLM(model, **BASE) as llm:
            self.alone = self.each_alone(llm)

    def each_alone(self, llm: LLM) -> list[Bits]:
        return [self.run(llm, [i])[i] for i in range(COUNT)]

    def run(
        self, llm: LLM, which: list[int], others: int = 0, cached: bool = False
    ) -> dict[int, Bits]:
        """The bits of some requests that run together, beside so many others."""
        if not cached:
            llm.reset_prefix_cache()
        rng = random.Random(others)
        prompts = [self.prompts[i] for i in which]
        params = [self.params[i] for i in which]
        for _ in range(others):
            # Others come first, in the middle and last.
            at = rng.randint(0, len(prompts))
            length = rng.choice([1, 30, 200, 600])
            prompts.insert(at, [rng.randrange(self.vocab_size) for _ in range(length)])
            params.insert(at, SamplingParams(max_tokens=rng.randint(1, 60), ignore_eos=True))
        outputs = llm.generate(prompts, params, use_tqdm=False)
        mine = [out for out, by in zip(outputs, params, strict=True) if by in self.params]
        return {i: (out["token_ids"], out["logprobs"]) for i, out in zip(which, mine, strict=True)}

    def lost(self, got: dict[int, Bits], alone: list[Bits] | None = None) -> list[int]:
        alone = self.alone if alone is None else alone
        return [i for i, bits in got.items() if bits != alone[i]]


def _of_family(folder: Path, name: str) -> Path:
    variant = replace(VARIANTS[name], heads=8, kv_heads=2, head_dim=64, hidden=256)
    variant = replace(variant, dtype=torch.bfloat16)
    sizes = {"intermediate_size": 512, "max_position_embeddings": 1024}
    if name.endswith(("-window", "-windows")):
        sizes["sliding_window"] = 100
    elif "layer_types" in variant.extra:
        sizes["sliding_window"] = 1024
    return write_checkpoint(folder, variant, **sizes)


@pytest.fixture(scope="module", params=[*SHAPES, "shipped", *FAMILIES])
def requests(request: Any, tmp_path_factory: Any, shipped: Path) -> Iterator[Requests]:
    if request.param == "shipped":
        yield Requests(request.param, shipped, 4096)
        return
    if request.param in FAMILIES:
        folder = tmp_path_factory.mktemp(request.param)
        yield Requests(request.param, _of_family(folder, request.param), VOCAB_SIZE)
        return
    patch = pytest.MonkeyPatch()
    patch.setitem(random_weights.SHAPES, "few layers", SHAPES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model = random_weights.make_checkpoint("few layers", folder, "cuda")
    patch.undo()
    yield Requests(request.param, model, SHAPES[request.param]["vocab_size"])


def test_in_company_and_after_prefix_hits(requests: Requests) -> None:
    everyone = list(range(COUNT))
    with LLM(requests.model, **BASE) as llm:
        for _ in range(3):
            assert requests.lost(requests.run(llm, everyone)) == []
        assert requests.lost(requests.run(llm, everyone[::-1], cached=True)) == []
        assert requests.lost(requests.run(llm, everyone, others=60)) == []
        assert requests.lost(requests.run(llm, everyone[3:9])) == []


@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": True},
        {"pipeline_depth": 0},
        {"max_num_batched_tokens": 64},
        {"kvcache_block_size": 16, "num_kvcache_blocks": 4000},
        {"kvcache_block_size": 64, "num_kvcache_blocks": 1000, "max_num_batched_tokens": 300},
        {"kvcache_block_size": 48, "num_kvcache_blocks": 30},
        {"kvcache_block_size": 16, "num_kvcache_blocks": 80},
    ],
    ids=str,
)
def test_with_other_options(requests: Requests, options: dict[str, Any]) -> None:
    everyone = list(range(COUNT))
    with LLM(requests.model, **{**BASE, **options}) as llm:
        assert requests.lost(requests.run(llm, everyone, others=20)) == []
        if options.get("num_kvcache_blocks", 300) <= 80 and requests.preempts:
            assert llm.stats().preemptions > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_with_two_ranks(requests: Requests) -> None:
    """They add up in another order than one rank does, but always in the same one."""
    everyone = list(range(COUNT))
    options = {**BASE, "tensor_parallel_size": 2}
    if requests.name.startswith(ONE_RANK):
        with pytest.raises(ConfigError, match="tensor_parallel_size"):
            LLM(requests.model, **options)
        return
    with LLM(requests.model, **options) as llm:
        alone = requests.each_alone(llm)
        for others in (0, 60):
            assert requests.lost(requests.run(llm, everyone, others), alone) == []
        assert requests.lost(requests.run(llm, everyone[::-1], cached=True), alone) == []
    options |= {"kvcache_block_size": 16, "num_kvcache_blocks": 80, "max_num_batched_tokens": 64}
    with LLM(requests.model, enforce_eager=True, pipeline_depth=0, **options) as llm:
        assert requests.lost(requests.run(llm, everyone, others=20), alone) == []
        assert llm.stats().preemptions > 0 or not requests.preempts


def test_the_engines_own_parts_need_no_test_at_start(shipped: Path) -> None:
    with LLM(shipped, check_exact=True, **BASE) as llm:
        assert llm.engine.runner.exact


def test_the_test_at_start_finds_no_lost_bits(shipped: Path) -> None:
    """A subclass counts as not measured, though it computes the same."""
    same = type("Same", (TritonAttention,), {})
    with LLM(shipped, check_exact=True, attention_backend=same, **BASE) as llm:
        assert not llm.engine.runner.exact
        assert llm.stats().steps == 0


def test_the_example_of_the_page(shipped: Path) -> None:
    [code] = code_of("docs/exact.md")
    run(code, shipped)
