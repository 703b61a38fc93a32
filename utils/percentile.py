"""Percentiles, in one way wherever they are told."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(rising: Sequence[float], share: float) -> float:
    """The least of the values that a share of them does not exceed: the nearest rank.

    Always one of the values, so that a p99 of few is their largest.

    Args:
        rising: at least one value, in rising order.
        share: above 0 and at most 1.
    """
    return rising[math.ceil(share * len(rising)) - 1]
