"""A whole model in shards, one thread per rank, against the undivided one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from config import Config
from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepPlan
from layers.parallel import ParallelContext
from sampling_params import SamplingParams
from tests.checkpoints import Checkpoints, random_prompts
from tests.recording import Logits, RecordingRunner
from utils.checkpoint import open_checkpoint, resolve
from utils.errors import ConfigError

PROMPTS = random_prompts([20, 3, 37], seed=31)


@dataclass(frozen=True)
class _Rank(ParallelContext):
    """Collectives through a list that all ranks see."""

    shared: list[Tensor | None] = field(default_factory=list)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.shared[self.rank] = x
        self.barrier.wait(60)
        parts = [part for part in self.shared if part is not None]
        self.barrier.wait(60)
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), -1)


def _plans() -> list[StepPlan]:
    """Prefill of three requests, the last one in two chunks, then decodes."""
    greedy = SamplingParams(temperature=0)
    new = tuple(NewRequest(i, i, tuple(p), greedy, 0) for i, p in enumerate(PROMPTS))
    blocks = tuple(BlockUpdate(i, 0, (3 * i + 2, 3 * i, 3 * i + 1)) for i in range(3))
    first = (
        PrefillChunk(0, 0, 20, True),
        PrefillChunk(1, 0, 3, True),
        PrefillChunk(2, 0, 30, False),
    )
    second = (PrefillChunk(2, 30, 7, True),)
    decodes = [StepPlan(2 + i, decode=(2, 0, 1)) for i in range(4)]
    return [StepPlan(0, new, blocks, first), StepPlan(1, prefill=second, decode=(0, 1)), *decodes]


def _run(checkpoint_name: str, checkpoints: Checkpoints, size: int) -> list[Logits]:
    checkpoint = open_checkpoint(str(checkpoints[checkpoint_name]))
    config = Config(
        model=str(checkpoint.path),
        device="cpu",
        max_num_seqs=3,
        max_model_len=48,
        kvcache_block_size=16,
        tensor_parallel_size=size,
    )
    config = resolve(config, checkpoint)
    shared: list[Tensor | None] = [None] * size
    barrier = threading.Barrier(size)

    def work(rank: int) -> Logits:
        runner = RecordingRunner(config, checkpoint, _Rank(rank, size, shared, barrier))
        try:
            for plan in _plans():
                runner.execute(plan).result()
        except BaseException:
            barrier.abort()
            raise
        finally:
            runner.close()
        return runner.logits

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("qwen3-gqa4-bias-tied", 2),
        ("qwen3-gqa4-bias-tied", 4),
        ("qwen2-gqa2-wide-heads-tied", 2),
        ("qwen3-square-tied", 2),
        ("qwen3-gqa6", 4),
        ("qwen2-bfloat16", 4),
    ],
)
def test_shards_compute_the_logits_of_the_whole(
    checkpoints: Checkpoints, name: str, size: int
) -> None:
    """The vocabulary of 259 divides by none of the sizes; KV heads are replicated in some."""
    (whole,) = _run(name, checkpoints, 1)
    for logits in _run(name, checkpoints, size):
        assert logits.keys() == whole.keys()
        for place, row in logits.items():
            torch.testing.assert_close(row, whole[place], rtol=1e-3, atol=1e-4)


def test_a_model_that_does_not_divide_is_refused(checkpoints: Checkpoints) -> None:
    checkpoint = open_checkpoint(str(checkpoints["qwen2-gqa6"]))
    config = Config(model="x", device="cpu", max_num_seqs=1, max_model_len=48)
    config = replace(resolve(config, checkpoint), tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="6 query heads") as caught:
        RecordingRunner(config, checkpoint, _Rank(0, 4))
    assert caught.value.field == "tensor_parallel_size"


def test_the_group_of_one_needs_no_partners() -> None:
    alone = ParallelContext()
    x = torch.ones(2, 3)
    assert alone.all_reduce(x) is x
    assert alone.all_gather(x) is x
    assert alone.kv_heads(4) == (0, 4)
