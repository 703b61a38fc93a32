"""A minute of `make fuzz`."""

from __future__ import annotations

import random

import pytest

from tests.contracts.fuzz import fuzz


@pytest.mark.slow
def test_random_traces_through_all_that_is_shipped() -> None:
    seed = random.randrange(2**32)
    tally = fuzz(100_000, seed=seed, jobs=1, seconds=60)
    assert not tally.failures, f"seed {seed}: {tally.failures[0]}"
    # The traces are worth something only if these happen.
    happens = "aborted", "stopped", "preemptions", "hit_tokens", "evicted_blocks", "copied_blocks"
    for name in happens:
        assert tally.counts[name] > tally.counts["traces"] / 100, name
