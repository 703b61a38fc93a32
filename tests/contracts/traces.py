"""Random serving traces: requests that share prefixes, aborts, tiny caches, drawn from one seed."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from engine.parts import PART_KINDS
from sampling_params import SamplingParams
from tests.contracts.driver import Driver, MakeBlocks, MakeScheduler, Setting
from utils.errors import RequestTooLongError

_BLOCK_SIZES = (1, 2, 3, 4, 8)
_LONGEST_OUTPUT = 24
# The fake model's end-of-sequence token, some of the others, and none at all.
_STOPS = (frozenset({0}), frozenset({0, 3, 17}), frozenset[int]())


@dataclass(frozen=True)
class Combination:
    """Parts that run together.

    Attributes:
        options: options of `Config`.
        policies: what else may be chosen for an option; a trace draws one of each.
    """

    scheduler: MakeScheduler
    blocks: MakeBlocks
    depth: int
    options: dict[str, Any] = field(default_factory=dict)
    policies: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        names = [getattr(part, "__name__", str(part)) for part in (self.scheduler, self.blocks)]
        return f"{names[0]} x {names[1]}, depth {self.depth}"


def shipped_schedulers() -> list[Any]:
    """Found, not listed: a new one is tested from its first day on."""
    return list(PART_KINDS["scheduler"].known().values())


def shipped_managers() -> list[Any]:
    """Likewise."""
    return list(PART_KINDS["block_manager"].known().values())


def shipped_policies(scheduler: Any, blocks: Any) -> dict[str, list[str]]:
    """For each option for a policy that these parts use, the names that the engine knows."""
    used = getattr(scheduler, "policies", ())
    names = {option: sorted(PART_KINDS[option].known()) for option in used}
    if getattr(blocks, "caches_prefixes", False):
        names["eviction_policy"] = sorted(PART_KINDS["eviction_policy"].known())
    return names


def shipped() -> list[Combination]:
    """Every scheduler with every block manager and depth that the engine has, and all policies."""
    return [
        Combination(scheduler, blocks, depth, policies=shipped_policies(scheduler, blocks))
        for scheduler, blocks, depth in product(shipped_schedulers(), shipped_managers(), (0, 1))
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
        self.options = {name: rng.choice(names) for name, names in parts.policies.items()}
        self.options |= parts.options
        self._setting = Setting(
            num_blocks=rng.randint(2, 24) if rng.random() < 0.8 else 200,
            block_size=size,
            max_num_seqs=max_num_seqs,
            budget=max_num_seqs + int(rng.expovariate(1 / 12)),
            depth=parts.depth,
            eos_chance=rng.choice((0.0, 0.05, 0.3)),
            options={**self.options, "num_speculative_tokens": rng.choice((0, 0, 1, 2, 3))},
            window=rng.choice((0, 0, 0, rng.randint(1, 20))),
            window_blocks=rng.randint(2, 24) if rng.random() < 0.8 else 200,
            error_chance=rng.choice((0.0, 0.0, 0.0, 0.02)),
            tells=rng.random() < 0.5,
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
                driver.submit(
                    self._prompt(),
                    self._params(),
                    stop_token_ids=rng.choice(_STOPS),
                    prompt_only=rng.random() < 0.05,
                )
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
            logprobs=rng.choice((None, None, 0)),
            predicted_tokens=rng.choice((None, rng.randint(1, _LONGEST_OUTPUT))),
        )
