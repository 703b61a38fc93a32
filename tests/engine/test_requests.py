"""Percentiles against their definition, at the sizes where ranks move."""

from __future__ import annotations

import pytest

from engine.outputs import percentile


@pytest.mark.parametrize("count", [1, 2, 3, 50, 99, 100, 101, 199, 200, 201, 1000])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_it_is_the_least_that_a_share_does_not_exceed(count: int, share: float) -> None:
    rising = [float(i) for i in range(count)]
    enough = [value for value in rising if sum(v <= value for v in rising) >= share * count]
    assert percentile(rising, share) == enough[0]


def test_equal_values() -> None:
    assert percentile([1.0, 2.0, 2.0, 2.0], 0.5) == 2.0
