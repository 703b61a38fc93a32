"""Tensor parallelism over CUDA devices."""

from __future__ import annotations

import gc
import os
import signal
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from config import Config
from engine.ranks.collectives import GroupContext, join_ranks, local_rank
from engine.ranks.runner import TensorParallelRunner
from engine.ranks.worker import Rank
from layers.norm_rope import RMSNorm, Stream
from layers.parallel import Place, ordered_sum
from llm import LLM, SamplingParams
from tests.engine.fake_ranks import rank_pids
from tests.engine.waits import no_wait_runs_out
from tests.gpu.test_engine_gpu import SMALL, TIE, TINY, greedy, random_prompts, worst_gap
from tests.kernels.peer_checks import PeerChecks
from tests.rank_parts import random_parts, same_bits
from utils.errors import ConfigError, WorkerDiedError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def exchange_sums(index: int, size: int, store: str) -> None:
    """One rank, in a process of its own."""
    config = Config(model="x", device="cuda", dtype="bfloat16", tensor_parallel_size=size)
    for width in (1024, 4096):
        context = join_ranks(config, Rank(index, size, f"{store}{width}", 1), width)
        assert context.exchange is not None
        device = torch.device("cuda", index)
        about = (index, size, 256, width, torch.bfloat16, device)
        PeerChecks(context.exchange, *about).run(100, seed=width)
        torch.cuda.synchronize()
        torch.distributed.destroy_process_group()


NCCL_ALONE = partial(TensorParallelRunner, make_runner=partial(local_rank, peer=False))


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).cuda().eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_runner": NCCL_ALONE},
        {"enforce_eager": True},
        {"pipeline_depth": 0},
        {"max_num_seqs": 3, "num_kvcache_blocks": 5},
        {"num_kvcache_blocks": None, "gpu_memory_utilization": 0.3},
    ],
    ids=["default", "nccl", "eager", "depth0", "preempts", "sized"],
)
def test_greedy_tokens_are_those_of_transformers(reference: Any, options: dict[str, Any]) -> None:
    prompts = random_prompts(12, 500)
    with LLM(TINY, tensor_parallel_size=2, **{**SMALL, **options}) as llm:
        outputs = greedy(llm, prompts, 48)
    assert worst_gap(reference, prompts, outputs) < TIE


def test_sampled_tokens_are_those_of_one_device() -> None:
    """In float32, where logits hardly ever differ enough to change a token."""
    prompts = random_prompts(16, 100)
    params = SamplingParams(temperature=0.8, max_tokens=24, ignore_eos=True, seed=11)
    tokens = []
    for size in (1, 2):
        options = {"dtype": "float32", "attention_backend": "torch", "tensor_parallel_size": size}
        with LLM(TINY, **options, **SMALL) as llm:
            tokens.append([o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)])
    assert tokens[0] == tokens[1]


def test_two_engines_share_the_devices(reference: Any) -> None:
    prompts = random_prompts(4, 100)
    options = {"tensor_parallel_size": 2, **SMALL}
    with LLM(TINY, **options) as one, LLM(TINY, **options) as two:
        for llm in (one, two, one):
            assert worst_gap(reference, prompts, greedy(llm, prompts, 16)) < TIE


def test_a_killed_rank_is_noticed_and_leaves_no_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = [torch.cuda.mem_get_info(device)[0] for device in range(2)]
    llm = LLM(TINY, tensor_parallel_size=2, gpu_memory_utilization=0.3, max_model_len=2048)
    params = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
    llm.add_request([5, 6, 7], params)
    for _ in range(50):
        llm.step()
    os.kill(rank_pids()[1], signal.SIGKILL)

    def run_on() -> None:
        while True:
            llm.step()

    with no_wait_runs_out(), pytest.raises(WorkerDiedError):
        run_on()
    llm.close()
    for device in range(2):
        assert before[device] - torch.cuda.mem_get_info(device)[0] <= 50 << 20


def test_more_ranks_than_devices_are_refused() -> None:
    if torch.cuda.device_count() >= 8:
        pytest.skip("there are devices for every size")
    with pytest.raises(ConfigError, match="CUDA devices"):
        LLM(TINY, tensor_parallel_size=8, **SMALL)


@pytest.mark.parametrize("size", [2, 4])
def test_sums_through_peer_memory_agree_to_the_bit(size: int, tmp_path: Path) -> None:
    if size > torch.cuda.device_count():
        pytest.skip(f"needs {size} CUDA devices")
    spawn(exchange_sums, (size, str(tmp_path / "store")), size)  # type: ignore[no-untyped-call]


ROWS = (1, 16, 255, 256, 257, 1000, 4096)


def sum_rows(index: int, size: int, store: str) -> None:
    """One rank, in a process of its own: sums of the first rows of the same matrices."""
    options: dict[str, Any] = {"model": "x", "device": "cuda", "tensor_parallel_size": size}
    cases = product(("bfloat16", "float16"), (1024, 4096), (True, False))
    for number, (name, width, peer) in enumerate(cases):
        rank = Rank(index, size, f"{store}{number}", 1)
        context = join_ranks(Config(dtype=name, **options), rank, width, peer=peer)
        assert (context.exchange is not None) == peer
        check_rows(context, getattr(torch, name), width)
        torch.cuda.synchronize()
        torch.distributed.destroy_process_group()


def check_rows(context: GroupContext, dtype: torch.dtype, width: int) -> None:
    """Up to 2 MB by the exchange if there is one, else by NCCL; also captured in a CUDA graph."""
    device = torch.device("cuda", context.rank)
    drawn = torch.Generator(device).manual_seed(width)
    parts = random_parts((context.size, ROWS[-1], width), drawn).to(dtype)
    residual, weight = parts.roll(1, 1)[0], torch.ones(width, dtype=dtype, device=device)
    expected = torch.zeros(ROWS[-1], width, device=device)
    for part in parts:
        expected += part.float()
    expected = expected.to(dtype)
    added = (expected.float() + residual.float()).to(dtype)
    mine = parts[context.rank]
    norm = RMSNorm(width, 1e-6, Place(context, dtype, device))
    norm.weight.copy_(weight)
    norm.prepare()
    for rows in ROWS:
        x = mine[:rows].clone()
        assert same_bits(context.all_reduce(x), expected[:rows]), rows
        # Whether one kernel adds the residual, or another one after the sum.
        _, stream = norm.compute(Stream(residual[:rows], mine[:rows].clone()))
        assert same_bits(stream.total, added[:rows]), rows
        x.copy_(mine[:rows])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = context.all_reduce(x)
        for _ in range(3):
            x.copy_(mine[:rows])
            graph.replay()
            assert same_bits(captured, expected[:rows]), rows
    splits = torch.stack((mine[:16].float(), residual[:16].float()))
    _, stream = norm.compute(Stream(residual[:16], splits))
    both = [ordered_sum(torch.stack((part[:16], residual[:16])), dtype) for part in parts]
    total = ordered_sum(torch.stack(both), dtype)
    assert same_bits(stream.total, (total.float() + residual[:16].float()).to(dtype))
    logits = context.all_gather(mine[:7])
    assert torch.equal(logits.view(torch.int16), parts[:, :7].contiguous().view(torch.int16))


@pytest.mark.parametrize("size", [2, 4])
def test_a_rows_sum_has_the_same_bits_among_any_number_of_rows(size: int, tmp_path: Path) -> None:
    if size > torch.cuda.device_count():
        pytest.skip(f"needs {size} CUDA devices")
    spawn(sum_rows, (size, str(tmp_path / "store")), size)  # type: ignore[no-untyped-call]
