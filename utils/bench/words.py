"""Figures in words, a line each."""

from __future__ import annotations

import statistics

from utils.bench.compare import Measured, Row
from utils.roofline import Ceilings


def describe_ceilings(ceilings: Ceilings) -> str:
    """The machine's limits in words."""
    return (
        f"ceilings: {ceilings.read_bandwidth / 1e12:.2f} TB/s read, "
        f"{ceilings.matmul_rate / 1e12:.0f} TFLOP/s bf16 matmul"
    )


def describe_engine(one: Measured) -> str:
    """One engine's start-up and outputs in words."""
    if one.problem is not None:
        return f"{one.engine}: {one.problem}"
    exact = sum(agreement.exact for agreement in one.agreements.values())
    total = sum(agreement.total for agreement in one.agreements.values())
    warmups = ", ".join(f"{seconds:.2f}" for seconds in one.warmups.values())
    return (
        f"{one.engine}: ready after {one.startup_seconds:.1f} s, {one.construct_seconds:.1f} of "
        f"them construction; warm-ups {warmups} s; {exact} of {total} greedy tokens are the "
        "reference's own, the rest ties of rounding"
    )


def describe_row(row: Row) -> str:
    """One row in words."""
    rates = row.rates
    line = (
        f"{row.workload:<22}{row.engine:<16}{row.median:>9.1f} tok/s "
        f"({rates[0]:.1f} to {rates[-1]:.1f} in {len(rates)})"
    )
    if row.speedups is not None:
        ratio, low, high = statistics.median(row.speedups), row.speedups[0], row.speedups[-1]
        line += f"  {ratio:.2f} times {row.baseline} ({low:.2f} to {high:.2f})"
    if row.limit is not None:
        line += f"  {row.median / row.limit:.3f} of the limit {row.limit:.0f}"
    if row.output_tokens == 1:
        line += f"  {1e3 * statistics.median(row.seconds):.2f} ms"
    if row.peak_bytes is not None:
        line += f"  {row.peak_bytes / 2**30:.2f} GiB"
    return f"{line}  greedy {row.agreement}"
