"""docs/scheduling.md: its code runs, its drawings are what the script draws."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import timeline
from engine.scheduler import ContinuousScheduler
from memory.block_manager import PrefixCacheManager
from sampling_params import SamplingParams
from tests.contracts.driver import Driver, Setting
from tests.contracts.scheduler import SchedulerContract

PAGE = (Path(__file__).parents[2] / "docs" / "scheduling.md").read_text()


def _defined(name: str) -> Any:
    """A class that one of the page's snippets defines."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE, re.S) if f"class {name}(" in c)
    namespace: dict[str, Any] = {"__name__": "docs"}
    exec(code, namespace)
    return namespace[name]


def test_the_queue_order_of_ones_own() -> None:
    options = {"queue_policy": _defined("ShortPromptsPass")}
    setting = Setting(max_num_seqs=1, options=options)
    driver = Driver(setting, ContinuousScheduler, PrefixCacheManager)
    for n in (600, 512, 513, 5):
        driver.submit([1] * n, SamplingParams(temperature=0, max_tokens=2))
    driver.finish()
    admitted = [new.request_id for plan in driver.plans for new in plan.new_requests]
    assert admitted == [1, 3, 0, 2]


class TestTheSchedulerOfOnesOwn(SchedulerContract):
    make_scheduler = _defined("OneByOne")
    num_traces = 100
    num_examples = 10


def test_it_is_a_scheduler_in_20_lines() -> None:
    (code,) = re.findall(r"```python\n(from engine.scheduler.*?)```", PAGE, re.S)
    assert len(code.splitlines()) <= 20


@pytest.mark.parametrize("policy", ["decode_first", "prefill_first"])
def test_the_drawings_are_up_to_date(policy: str) -> None:
    (drawing,) = re.findall(rf"<!-- timeline {policy} -->\n```\n(.*?)\n```", PAGE, re.S)
    assert timeline.draw(timeline.simulate(timeline.EXAMPLE, step_policy=policy)) == drawing


def test_an_idea_is_tried_in_virtual_time(shipped: Path) -> None:
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "def mean_wait(" in c)
    namespace: dict[str, Any] = {"__name__": "docs"}
    exec(code, namespace)
    options = {"num_kvcache_blocks": 64}
    in_order = namespace["mean_wait"](shipped, **options)
    shortest = namespace["mean_wait"](shipped, queue_policy="shortest_prompt", **options)
    assert 0 < shortest < 0.9 * in_order
    assert namespace["mean_wait"](shipped, **options) == in_order
