"""When what ran, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """A phase of a step, in seconds from an origin that host and device share."""

    step_id: int
    phase: str
    start: float
    end: float

    def shifted(self, by: float) -> Span:
        return replace(self, start=self.start + by, end=self.end + by)
