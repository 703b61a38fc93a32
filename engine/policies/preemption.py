"""Whose blocks are taken when they run out."""

from __future__ import annotations

from collections.abc import Collection

from engine.policies.base import PreemptionPolicy
from engine.sequence import Sequence


class Latest(PreemptionPolicy):
    """The last admitted."""

    name = "latest"

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return list(running)[-1]


class LowestPriority(PreemptionPolicy):
    """The lowest `SamplingParams.priority`, the last admitted among equals."""

    name = "lowest_priority"

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return min(reversed(list(running)), key=lambda seq: seq.sampling.priority)


class FewestComputed(PreemptionPolicy):
    """The one with the least to compute again, the last admitted among equals."""

    name = "fewest_computed"

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return min(reversed(list(running)), key=lambda seq: seq.num_committed)
