"""What a step computes first."""

from __future__ import annotations

from engine.policies.base import StepPolicy


class DecodeFirst(StepPolicy):
    """Every running request decodes in every step; prompts fill the rest (Sarathi-Serve)."""

    name = "decode_first"

    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        return budget - num_decodes


class PrefillFirst(StepPolicy):
    """Prompts take the whole step, `max_gap` times in a row at most while requests decode.

    First tokens come sooner, the others less evenly. Two tokens of a running request are never
    more than `max_gap` + 1 steps apart.
    """

    name = "prefill_first"
    max_gap = 4

    def prefill_budget(self, budget: int, num_decodes: int, gap: int) -> int:
        return budget if gap < self.max_gap else budget - num_decodes
