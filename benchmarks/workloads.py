"""The requests that engines are measured on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sampling_params import SamplingParams


@dataclass(frozen=True)
class Workload:
    """Requests by their prompts, the number of tokens to generate for each, and a temperature.

    Attributes:
        checked: its own greedy outputs are compared with transformers; those of the other
            workloads are vouched for by `check_workload`.
        groups: names and sizes of the groups that the requests consist of, in order, where the
            latency of each is of interest.
    """

    name: str
    prompts: list[list[int]]
    lengths: list[int]
    temperature: float = 0.0
    checked: bool = False
    groups: tuple[tuple[str, int], ...] = ()

    @property
    def num_output_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens that the longest request comes to, prompt and output."""
        return max(len(p) + n for p, n in zip(self.prompts, self.lengths, strict=True))

    def sampling_params(self, **others: Any) -> list[SamplingParams]:
        """In the words of this engine, for each request; nothing ends an output early.

        Args:
            others: what else to set, in all of them.
        """
        return [
            SamplingParams(temperature=self.temperature, max_tokens=n, ignore_eos=True, **others)
            for n in self.lengths
        ]

    def rotated(self, by: int) -> Workload:
        """The same with each prompt rotated, so that no engine's prefix cache knows it already."""
        prompts = [p[by % len(p) :] + p[: by % len(p)] for p in self.prompts]
        return replace(self, prompts=prompts)


NAMES = ("compare", "small", "seeds", "seeds128", "latency", "ttft", "crowd", "flood")


def seeds_workload(count: int = 256, vocab_size: int = 151_936) -> Workload:
    """The workload of the project's founding benchmark notes: 133,966 tokens to generate.

    Args:
        count: take the first requests alone.
    """
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    prompts = [[token % vocab_size for token in prompt] for prompt in prompts]
    lengths = [rng.randint(100, 1024) for _ in range(256)]
    return Workload(f"seeds, {count} requests", prompts[:count], lengths[:count], 0.6)


def random_workload(
    name: str,
    count: int,
    prompt: tuple[int, int],
    output: tuple[int, int],
    vocab_size: int,
    *,
    checked: bool = False,
) -> Workload:
    """Greedy requests with random prompts and lengths in closed ranges; the same for a name."""
    rng = random.Random(name)
    prompts = [
        [rng.randrange(vocab_size) for _ in range(rng.randint(*prompt))] for _ in range(count)
    ]
    lengths = [rng.randint(*output) for _ in range(count)]
    return Workload(name, prompts, lengths, checked=checked)


def check_workload(vocab_size: int, max_model_len: int) -> Workload:
    """Greedy requests of many lengths, whose tokens are compared with transformers.

    Args:
        max_model_len: no request is longer; at least 65.
    """
    prompt = (5, min(700, max_model_len - 60))
    return random_workload("check", 16, prompt, (20, 60), vocab_size, checked=True)


def works_of(names: Sequence[str], vocab_size: int) -> list[Workload]:
    """The workloads behind several --workload names; one that is behind two of them once."""
    found: dict[str, Workload] = {}
    for work in (work for name in names for work in works_for(name, vocab_size)):
        # The requests are the same, but they may be checked in one place alone.
        if work.name not in found or work.checked:
            found[work.name] = work
    return list(found.values())


def works_for(name: str, vocab_size: int) -> list[Workload]:
    """The workloads behind a --workload name."""
    if name.startswith("seeds"):
        return [seeds_workload(int(name.removeprefix("seeds") or 256), vocab_size)]
    if name == "latency":
        return [
            random_workload(f"{n} x (128, 512)", n, (128, 128), (512, 512), vocab_size)
            for n in (1, 8, 64)
        ]
    if name == "ttft":
        return [
            random_workload(f"first token of {n}", 1, (n, n), (1, 1), vocab_size)
            for n in (128, 1024, 3800)
        ]
    if name == "crowd":
        short = random_workload("short", 16, (64, 64), (128, 128), vocab_size)
        long = random_workload("long", 32, (1500, 1500), (16, 16), vocab_size)
        prompts, lengths = short.prompts + long.prompts, short.lengths + long.lengths
        groups = (("short", 16), ("long", 32))
        return [Workload("16 short, 32 of 1,500", prompts, lengths, groups=groups)]
    if name == "flood":
        return [random_workload("1,024 of 16 to 64", 1024, (16, 64), (16, 64), vocab_size)]
    if name == "small":
        small = random_workload("8 of 16 to 64", 8, (16, 64), (16, 64), vocab_size, checked=True)
        return [small]
    one = random_workload("1 x (128, 512)", 1, (128, 128), (512, 512), vocab_size, checked=True)
    mixed = random_workload(
        "32 mixed, 16 to 256", 32, (16, 256), (16, 256), vocab_size, checked=True
    )
    return [one, mixed]
