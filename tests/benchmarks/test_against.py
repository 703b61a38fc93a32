"""Two checkouts in turn: here this one twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.against import Engine, jobs, main
from benchmarks.processes import EngineFailedError
from benchmarks.variants import FILTERS

ROOT = Path(__file__).parents[2]


def test_this_checkout_gives_the_tokens_of_itself(
    shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = '{"device": "cpu", "max_num_seqs": 8, "num_kvcache_blocks": 64}'
    about = ["--workload", "small", "ready", "--pairs", "1", "--options", options]
    main([str(ROOT), "--model", str(shipped), *about])
    ready, again, small, *rest = capsys.readouterr().out.splitlines()
    assert "ready" in ready
    assert "ready" in again
    assert re.fullmatch(
        r"8 of 16 to 64: \d+\.\d{3} \[.*\] in 1 pairs, .* ms, equal tokens in 1", small
    )
    assert len([line for line in rest if "ready again" in line]) == 2


def test_an_engine_that_does_not_start(shipped: Path) -> None:
    with pytest.raises(EngineFailedError, match="exit code 1"):
        Engine(ROOT, shipped, {"device": "cpu", "no_such_option": 1}, "")


def test_filters_are_jobs_of_their_own() -> None:
    found = dict(jobs(["latency", "filters", "ready"], 100, cuda=False))
    assert [*found][:3] == ["1 x (128, 512)", "8 x (128, 512)", "64 x (128, 512)"]
    [(_, params)] = [job for name, job in found.items() if name.endswith(", logprobs=0")]
    assert params == {"logprobs": 0}
    assert len(found) == 3 + len(FILTERS)
