"""A scheduler on a fake runner, with requests that are made up; nothing here needs torch."""

from __future__ import annotations

from engine.checking.fake_runner import FakeModel
from engine.requests import Sequence
from engine.scheduler import ContinuousScheduler
from memory.block_manager import PagedBlockManager
from sampling_params import SamplingParams
from tests.contracts.driver import Driver, MakeBlocks, MakeScheduler, Setting

VOCAB_SIZE = FakeModel().vocab_size


def tokens_alone(seq: Sequence) -> list[int]:
    """What the fake model generates for a request that has it to itself."""
    return FakeModel().alone(
        seq.token_ids[: seq.num_prompt_tokens],
        seq.max_total_tokens - seq.num_prompt_tokens,
        stop_token_ids=seq.stop_token_ids,
        seed=seq.seed,
    )


class Bench(Driver):
    """A driver with defaults."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 16,
        max_num_seqs: int = 4,
        budget: int = 64,
        depth: int = 0,
        make_scheduler: MakeScheduler = ContinuousScheduler,
        make_blocks: MakeBlocks = PagedBlockManager,
    ) -> None:
        setting = Setting(num_blocks, block_size, max_num_seqs, budget, depth)
        super().__init__(setting, make_scheduler, make_blocks)

    def add(
        self, num_prompt: int, max_tokens: int = 8, *, stop: frozenset[int] = frozenset()
    ) -> Sequence:
        """Queue a request with a prompt of its own."""
        start = len(self.seqs) * 7
        prompt = [(start + i * 3) % VOCAB_SIZE for i in range(num_prompt)]
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        return self.submit(prompt, params, stop_token_ids=stop)

    def drain(self) -> None:
        """Commit all that is in flight."""
        while self.pipeline:
            self.land()

    def assert_outputs(self) -> None:
        """Every request has the tokens it would have alone."""
        for seq in self.seqs:
            self.check_output(seq)
