"""The progress bar of a generate call."""

from __future__ import annotations

import time

from tqdm import tqdm

from engine.types import StepPlan


class Progress:
    """Counts finished requests and shows how fast prompts are computed and tokens come out.

    A step's wall time is charged to prefill if it computed any prompt tokens, else to decode,
    so the two rates do not dilute each other.
    """

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar = tqdm(
            total=total, desc="Generating", unit="req", disable=not enabled, dynamic_ncols=True
        )
        self._tokens = [0, 0]
        self._seconds = [0.0, 0.0]
        self._last = time.perf_counter()

    def update(self, plan: StepPlan | None, num_tokens: int, num_finished: int) -> None:
        """Take in one committed step.

        Args:
            num_tokens: that it gave to all requests.
        """
        if self._bar.disable:
            return
        now = time.perf_counter()
        if plan is not None:
            decode = int(not plan.prefill)
            self._tokens[decode] += num_tokens if decode else plan.num_prefill_tokens
            self._seconds[decode] += now - self._last
            rates = [
                f"{tokens / seconds:.0f} tok/s" if seconds else "-"
                for tokens, seconds in zip(self._tokens, self._seconds, strict=True)
            ]
            self._bar.set_postfix(prefill=rates[0], decode=rates[1], refresh=False)
        self._last = now
        self._bar.update(num_finished)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
