"""When figures are told, who holds the device then, and how long groups of requests waited."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import compare, run
from benchmarks.compare import Contender
from benchmarks.engines import Ours, Setting, Tokens, Transformers
from benchmarks.latency import Latency, by_group
from benchmarks.processes import Ran
from benchmarks.reference import Agreement
from benchmarks.run import run_comparison
from benchmarks.workloads import Workload, random_workload, works_for
from tests.checkpoints import Checkpoints

WORK = replace(
    random_workload("w", 3, (4, 9), (3, 6), 200, checked=True), groups=(("short", 2), ("long", 1))
)


class _Device:
    """Engines without a process and a reference without a model, that note when they hold it."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def engine(self, name: str, setting: Setting) -> _Process:
        return _Process(self, str(setting.options["label"]))

    def reference(self, setting: Setting) -> _Reference:
        self.events.append("judge")
        return _Reference()


class _Process:
    startup_seconds = construct_seconds = 0.0

    def __init__(self, device: _Device, label: str) -> None:
        self._device, self._label = device, label
        device.events.append(f"start {label}")

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._device.events.append(f"end {self._label}")

    def run(self, work: Workload) -> Ran:
        seconds = {"slow": 4.0, "fast": 2.0}[self._label]
        latencies = [Latency(0.001 * i, 0.002, 0.003 + 0.001 * i) for i in (1, 2, 3)]
        return Ran(seconds, [[1] * n for n in work.lengths], 1 << 20, latencies)


class _Reference:
    def judge(self, work: Workload, outputs: Tokens) -> Agreement:
        return Agreement(1, 1)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_rates_are_told_when_an_engine_has_ended(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    device = _Device()
    monkeypatch.setattr(compare, "EngineProcess", device.engine)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, 0))
    monkeypatch.setattr(run, "Reference", device.reference)
    monkeypatch.setattr(run, "release_device", lambda d: device.events.append("release"))
    labels = ("fast", "slow")
    engines = [Contender(label, "ours", {"label": label}) for label in labels]
    setting = Setting("", "float32", kind, 256)
    _, rows = run_comparison(engines, setting, [WORK], 2, device.events.append, baseline="slow")
    told = [event for event in device.events if "tok/s" in event]
    known = ("start", "end", "judge", "release")
    steps = [event for event in device.events if event.startswith(known)]
    if kind == "cuda":
        alone = [[f"start {label}", f"end {label}", "judge", "release"] for label in labels]
        assert steps == [*alone[0], *alone[1]]
        assert [line.split()[1] for line in told] == ["fast", "slow", "fast", "slow"]
        assert device.events.index(told[0]) < device.events.index("start slow")
        # Its baseline comes later.
        assert "times slow" not in told[0]
        assert "2.00 times slow" in told[2]
    else:
        assert steps == ["start fast", "start slow", "end slow", "end fast", "judge", "release"]
        assert [line.split()[1] for line in told] == ["fast", "slow"]
        assert "2.00 times slow" in told[0]
    waits = [event for event in device.events if "first token after" in event]
    assert len(waits) == 2 * len(told)
    assert "2 short" in waits[0]
    assert "first token after 1.5 ms (the last one's after 2.0)" in waits[0]
    assert "p99 2.0 ms, longest 5.0 ms (5.0 to 5.0)" in waits[0]
    assert rows[0].latencies[1].longest_gap == [0.006, 0.006]


def test_latencies_are_put_together_by_group() -> None:
    first = [Latency(1.0, 0.1, 0.3), Latency(3.0, 0.3, 0.5), Latency(9.0, None, None)]
    second = [Latency(2.0, 0.2, 0.9), Latency(2.0, 0.2, 0.2), Latency(8.0, None, None)]
    short, long = by_group((("short", 2), ("long", 1)), [first, second])
    assert (short.group, short.num_requests) == ("short", 2)
    assert (short.first_token, short.last_first_token) == ([2.0, 2.0], [3.0, 2.0])
    assert (short.p99_gap, short.longest_gap) == ([0.2, 0.2], [0.5, 0.9])
    assert (long.first_token, long.p99_gap, long.longest_gap) == ([9.0, 8.0], [], [])
    assert by_group((("short", 2),), []) == []


def test_groups_of_the_crowd_are_all_of_it() -> None:
    (work,) = works_for("crowd", 200)
    short, long = work.groups
    assert {len(p) for p in work.prompts[: short[1]]} == {64}
    assert {len(p) for p in work.prompts[short[1] :]} == {1500}
    assert short[1] + long[1] == len(work.prompts)


def test_our_engine_tells_and_others_do_not(checkpoints: Checkpoints) -> None:
    setting = Setting(str(checkpoints["qwen3-gqa6"]), "float32", "cpu", 256, threads=1)
    engine = Ours(setting)
    engine.generate(WORK)
    found = engine.latencies()
    assert len(found) == 3
    for one in found:
        assert one.p99_gap is not None
        assert one.longest_gap is not None
        assert 0 < one.p99_gap <= one.longest_gap
        assert one.first_token > 0
    assert Transformers(setting).latencies() is None
