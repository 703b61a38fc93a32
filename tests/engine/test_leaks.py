"""What ended requests leave behind: nothing that grows with their number."""

from __future__ import annotations

import random
from collections import Counter, deque
from pathlib import Path
from typing import Any

import pytest

from llm import LLM, SamplingParams

_OURS = ("config", "engine", "llm", "memory", "utils")


def _elements(root: object) -> Counter[str]:
    """How many elements the containers below `root` have, by the attributes that lead to them."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        path, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (dict, list, set, frozenset, tuple, deque)):
            counts[path] += len(value)
            inside = [*value, *value.values()] if isinstance(value, dict) else [*value]
            todo += [(path + "[]", element) for element in inside]
        elif type(value).__module__.partition(".")[0] in _OURS and not isinstance(value, type):
            names = {*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())}
            todo += [(f"{path}.{name}", getattr(value, name, None)) for name in names]
    return counts


def _serve(llm: LLM, count: int, rng: random.Random) -> None:
    """Requests of all kinds: preempted, aborted, streamed, with stop strings, several outputs."""
    for start in range(0, count, 10):
        params = [
            SamplingParams(
                max_tokens=rng.randint(1, 40),
                n=rng.choice((1, 1, 2)),
                stop=rng.choice(((), ("e",))),
                user=rng.choice("ab"),
            )
            for _ in range(10)
        ]
        prompts = [[rng.randrange(100) for _ in range(rng.randint(1, 60))] for _ in params]
        ids = [llm.add_request(p, q) for p, q in zip(prompts[:5], params[:5], strict=True)]
        llm.step()
        llm.abort(ids[0])
        if start % 20:
            llm.generate(prompts[5:], params[5:], use_tqdm=False)
        else:
            stream = llm.stream(prompts[5:], params[5:])
            next(stream)
            stream.close()
        while llm.has_unfinished:
            llm.step()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("queue", ["fcfs", "fair_share", "shortest_job"])
@pytest.mark.parametrize("manager", ["prefix", "radix", "paged"])
def test_ended_requests_leave_nothing_behind(
    shipped: Path, depth: int, queue: str, manager: str
) -> None:
    rng = random.Random(0)
    with LLM(
        shipped,
        model_runner="fake",
        kvcache_block_size=16,
        num_kvcache_blocks=8,
        max_num_seqs=4,
        pipeline_depth=depth,
        queue_policy=queue,
        block_manager=manager,
        num_speculative_tokens=2,
    ) as llm:
        _serve(llm, 40, rng)
        before = _elements(llm)
        _serve(llm, 300, rng)
        assert llm.stats().preemptions > 0
        grown = _elements(llm) - before
    # Caches, heaps and slots differ by chance; what is kept of every request is 300 and more.
    assert not {path: count for path, count in grown.items() if count > 150}
