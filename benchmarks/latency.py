"""How long requests waited for their tokens, by the engine's own account."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Latency:
    """Of one request, in seconds.

    Attributes:
        first_token: from arrival to the first token.
        p99_gap: the 99th percentile of the times between two tokens; None with fewer than two.
        longest_gap: the longest of them.
    """

    first_token: float
    p99_gap: float | None
    longest_gap: float | None


@dataclass(frozen=True)
class GroupLatency:
    """Of a group of requests, in seconds; one value for each repeat of a workload.

    Attributes:
        first_token: median over the requests.
        last_first_token: of the request that waited longest for it.
        p99_gap: median over the requests of their 99th percentiles; none without two tokens.
        longest_gap: of all requests.
    """

    group: str
    num_requests: int
    first_token: list[float]
    last_first_token: list[float]
    p99_gap: list[float]
    longest_gap: list[float]


def by_group(
    groups: Sequence[tuple[str, int]], repeats: Sequence[Sequence[Latency]]
) -> list[GroupLatency]:
    """The latencies of every repeat, group by group.

    Args:
        groups: names and sizes of the groups, in the order of the requests.
        repeats: of each repeat those of all requests; without any there is nothing to tell.
    """
    found, start = [], 0
    for name, size in groups if repeats else ():
        parts = [repeat[start : start + size] for repeat in repeats]
        firsts = [[one.first_token for one in part] for part in parts]
        p99 = [[one.p99_gap for one in part if one.p99_gap is not None] for part in parts]
        longest = [[o.longest_gap for o in part if o.longest_gap is not None] for part in parts]
        found.append(
            GroupLatency(
                name,
                size,
                first_token=[statistics.median(times) for times in firsts],
                last_first_token=[max(times) for times in firsts],
                p99_gap=[statistics.median(times) for times in p99 if times],
                longest_gap=[max(times) for times in longest if times],
            )
        )
        start += size
    return found
