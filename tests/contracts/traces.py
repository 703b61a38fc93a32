"""Random serving traces: requests that share prefixes, aborts, tiny caches, drawn from one seed."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

from engine.types import BlockManager, Scheduler
from sampling_params import SamplingParams
from tests.contracts.driver import Driver, MakeBlocks, MakeScheduler, Setting
from utils.errors import RequestTooLongError
from utils.registry import parts_in

_BLOCK_SIZES = (1, 2, 3, 4, 8)
_LONGEST_OUTPUT = 24
# The fake model's end-of-sequence token, some of the others, and none at all.
_STOPS = (frozenset({0}), frozenset({0, 3, 17}), frozenset[int]())


@dataclass(frozen=True)
class Combination:
    """Parts that run together."""

    scheduler: MakeScheduler
    blocks: MakeBlocks
    depth: int
    options: dict[str, Any]

    def __str__(self) -> str:
        names = [getattr(part, "__name__", str(part)) for part in (self.scheduler, self.blocks)]
        return f"{names[0]} x {names[1]}, depth {self.depth}, {self.options}"


def shipped() -> list[Combination]:
    """Every scheduler with every block manager, depth and policy that the engine has."""
    schedulers: list[Any] = [*parts_in("engine", Scheduler).values()]
    managers: list[Any] = [*parts_in("memory", BlockManager).values()]
    return [
        Combination(scheduler, blocks, depth, {})
        for scheduler, blocks, depth in product(schedulers, managers, (0, 1))
    ]


class Trace:
    """One random run; equal seeds give equal runs.

    Args:
        seed: of everything drawn.
    """

    def __init__(self, seed: str, parts: Combination) -> None:
        self._rng = rng = random.Random(seed)
        size = rng.choice(_BLOCK_SIZES)
        max_num_seqs = rng.randint(1, 6)
        self._setting = Setting(
            num_blocks=rng.randint(2, 24) if rng.random() < 0.8 else 200,
            block_size=size,
            max_num_seqs=max_num_seqs,
            budget=max_num_seqs + int(rng.expovariate(1 / 12)),
            depth=parts.depth,
            eos_chance=rng.choice((0.0, 0.05, 0.3)),
            options=parts.options,
        )
        self.driver = Driver(self._setting, parts.scheduler, parts.blocks)
        # Prompts are made of few words as long as a block, so that equal blocks appear behind
        # different beginnings.
        count = rng.randint(1, 4)
        self._words = [[rng.randrange(50) for _ in range(size)] for _ in range(count)]
        self._aborts = rng.choice((0.0, 0.1, 0.4))

    def run(self) -> Driver:
        """Play the trace to its end; raises ContractError at the first broken rule."""
        rng, driver = self._rng, self.driver
        for _ in range(rng.randint(1, 16)):
            with suppress(RequestTooLongError):
                driver.submit(self._prompt(), self._params(), stop_token_ids=rng.choice(_STOPS))
            if driver.seqs and rng.random() < self._aborts:
                driver.abort(rng.choice(driver.seqs).request_id)
            for _ in range(int(rng.expovariate(0.5))):
                self._move()
        driver.finish()
        return driver

    def _move(self) -> None:
        """A step, or half of one."""
        if self._rng.random() < 0.8:
            self.driver.step()
        elif len(self.driver.pipeline) <= self._setting.depth:
            self.driver.launch()
        else:
            self.driver.land()

    def _prompt(self) -> list[int]:
        rng, seqs = self._rng, self.driver.seqs
        if seqs and rng.random() < 0.3:
            # The next turn of a chat, or the same prompt again, whole or in part.
            tokens = rng.choice(seqs).token_ids[: rng.randint(1, 40)]
        else:
            tokens = [token for _ in range(rng.randint(0, 5)) for token in rng.choice(self._words)]
        return tokens + [rng.randrange(50) for _ in range(rng.randint(not tokens, 4))]

    def _params(self) -> SamplingParams:
        rng = self._rng
        return SamplingParams(
            temperature=0,
            max_tokens=rng.randint(1, _LONGEST_OUTPUT),
            priority=rng.randint(0, 2),
            user=rng.choice("abc"),
            cache_salt=rng.choice(("", "", "", "salt")),
            predicted_tokens=rng.choice((None, rng.randint(1, _LONGEST_OUTPUT))),
        )
