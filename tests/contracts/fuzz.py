"""Runs random traces through every shipped combination: python -m tests.contracts.fuzz."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pool

from tests.contracts.traces import Trace, shipped

# Traces given to a process at a time: tens of milliseconds.
_CHUNK = 32
# Pickling costs as much as the trace; plans are alike, so one trace in sixteen will do.
_PICKLED = 16


@dataclass
class Tally:
    """What happened in some traces; `failures` are (index, combination, what was broken)."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str, str]] = field(default_factory=list)


def run_chunk(seed: int, indices: range) -> Tally:
    """Play the traces with these indices."""
    combinations = shipped()
    tally = Tally()
    for index in indices:
        parts = combinations[index % len(combinations)]
        trace = Trace(f"{seed}-{index}", parts)
        try:
            driver = trace.run()
            if index // len(combinations) % _PICKLED == 0:
                driver.check_pickles()
        except Exception as error:
            tally.failures.append(
                (index, f"{parts}, {trace.options}", f"{type(error).__name__}: {error}")
            )
            continue
        seqs = driver.seqs
        tally.counts.update(
            traces=1,
            steps=len(driver.plans),
            requests=len(seqs),
            aborted=sum(seq.finish_reason == "abort" for seq in seqs),
            stopped=sum(seq.finish_reason == "stop" for seq in seqs),
            preemptions=sum(seq.num_preemptions for seq in seqs),
            hit_tokens=driver.blocks.num_hit_tokens,
            evicted_blocks=driver.blocks.stats.evicted_blocks,
            copied_blocks=sum(len(plan.block_copies) for plan in driver.plans),
        )
    return tally


def fuzz(
    num_traces: int, *, seed: int, jobs: int, seconds: float | None = None, first: int = 0
) -> Tally:
    """Play traces until there were `num_traces`, or time is up, or one failed.

    Args:
        first: index of the first trace.
        seconds: stop after so long; None never.
    """
    begin = time.monotonic()
    total = Tally()
    end = first + num_traces
    chunks = [range(i, min(i + _CHUNK, end)) for i in range(first, end, _CHUNK)]
    with Pool(jobs) as pool:
        for tally in pool.imap_unordered(partial(run_chunk, seed), chunks):
            total.counts += tally.counts
            total.failures += tally.failures
            late = seconds is not None and time.monotonic() - begin > seconds
            if total.failures or late:
                break
    total.failures.sort()
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", type=int, help="index of the one trace to play")
    args = parser.parse_args()
    begin = time.monotonic()
    print(f"fuzz: seed {args.seed}, {len(shipped())} combinations, {args.jobs} processes")
    if args.only is not None:
        Trace(f"{args.seed}-{args.only}", shipped()[args.only % len(shipped())]).run()
        return 0
    tally = fuzz(args.traces, seed=args.seed, jobs=args.jobs, seconds=args.seconds)
    print(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in tally.counts.items()))
    print(f"{len(tally.failures)} violations in {time.monotonic() - begin:.1f} s")
    for index, parts, what in tally.failures[:3]:
        print(f"\n{what}\nin trace {index}, {parts}")
        print(f"again: python -m tests.contracts.fuzz --seed {args.seed} --only {index}")
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
