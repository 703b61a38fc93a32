"""All ranks in one process: real shards and real gloo collectives, one thread per rank."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.distributed as dist

from config import Config
from engine.ranks.collectives import gloo_context
from engine.types import KVGeometry, ModelRunner, StepHandle, StepPlan, StepResult
from tests.recording import Logits, RecordingRunner
from utils.checkpoint import Checkpoint


class _Steps(StepHandle):
    """One step on every rank."""

    def __init__(self, steps: list[Future[StepResult]]) -> None:
        self._steps = steps

    def result(self) -> StepResult:
        first, *others = (step.result() for step in self._steps)
        same = {(str(r.tokens), str(r.logprobs), str(r.prompt_logprobs)) for r in (first, *others)}
        assert len(same) == 1, "ranks have sampled different tokens"
        return first


class ThreadedRanks(ModelRunner):
    """As many recording runners as there are ranks; much quicker to start than processes."""

    name = "threaded_ranks"

    def __init__(self, config: Config, checkpoint: Checkpoint, *, size: int) -> None:
        config = replace(config, tensor_parallel_size=size, pipeline_depth=0)
        store = dist.HashStore()  # type: ignore[attr-defined]
        # A thread each, so that every rank runs its steps in order.
        self._threads = [ThreadPoolExecutor(1) for _ in range(size)]

        def make(rank: int) -> RecordingRunner:
            return RecordingRunner(config, checkpoint, gloo_context(rank, size, store))

        self.ranks = [
            future.result()
            for future in [t.submit(make, rank) for rank, t in enumerate(self._threads)]
        ]
        self._vocab_size = int(checkpoint.hf_config.vocab_size)

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        return self.ranks[0].kv_groups

    def execute(self, plan: StepPlan) -> StepHandle:
        def run(rank: RecordingRunner) -> StepResult:
            return rank.execute(plan).result()

        return _Steps(
            [t.submit(run, rank) for t, rank in zip(self._threads, self.ranks, strict=True)]
        )

    def close(self) -> None:
        for thread, rank in zip(self._threads, self.ranks, strict=True):
            thread.shutdown()
            rank.close()

    @property
    def logits(self) -> Logits:
        """The whole vocabulary's, of every computed position."""
        parts = [rank.logits for rank in self.ranks]
        return {
            place: torch.cat([part[place] for part in parts])[: self._vocab_size]
            for place in parts[0]
        }
