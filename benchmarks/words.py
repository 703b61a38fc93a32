"""Figures in words, a line each."""

from __future__ import annotations

import statistics

from benchmarks.compare import Measured, Row
from benchmarks.exact import Kept
from benchmarks.exact_quality import Quality
from benchmarks.kernel_speed import KernelTime
from benchmarks.latency import GroupLatency
from benchmarks.overlap import Overlap
from benchmarks.roofline import Ceilings
from benchmarks.variants import Variants


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
        + (f"; not watched: {one.watch_problem}" if one.watch_problem else "")
    )


def describe_row(row: Row) -> str:
    """One row in words."""
    values = row.milliseconds if row.is_first_token else row.rates
    digits, unit = (2, "ms") if row.is_first_token else (1, "tok/s")
    line = (
        f"{row.workload:<22}{row.engine:<16}{statistics.median(values):>9.{digits}f} {unit} "
        f"({values[0]:.{digits}f} to {values[-1]:.{digits}f} in {len(values)})"
    )
    if row.speedups is not None:
        ratio, low, high = statistics.median(row.speedups), row.speedups[0], row.speedups[-1]
        line += f"  {ratio:.2f} times {row.baseline} ({low:.2f} to {high:.2f})"
    if row.limit is not None and row.limit_seconds is not None:
        limit = f"{1e3 * row.limit_seconds:.2f} ms" if row.is_first_token else f"{row.limit:.0f}"
        line += f"  {row.median / row.limit:.3f} of the limit {limit}"
    if row.peak_bytes is not None:
        line += f"  {row.peak_bytes / 2**30:.2f} GiB"
    return f"{line}  greedy {row.agreement}"


def describe_latency(row: Row, group: GroupLatency) -> str:
    """How long a group of a row's requests waited for tokens in words; medians over the repeats."""
    words = [
        f"first token after {_milliseconds(group.first_token)} ms (the last one's after "
        f"{_milliseconds(group.last_first_token)})"
    ]
    if group.longest_gap:
        words.append(
            f"between tokens p99 {_milliseconds(group.p99_gap)} ms, "
            f"longest {_milliseconds(group.longest_gap)} ms "
            f"({1e3 * min(group.longest_gap):.1f} to {1e3 * max(group.longest_gap):.1f})"
        )
    who = f"{group.num_requests} {group.group}"
    return f"  {who:<20}{row.engine:<18}{', '.join(words)}"


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f}"


def describe_variants(found: Variants) -> list[str]:
    """What was checked, and what each variant of a workload cost."""
    first = found.timed[0].name
    lines = [
        f"{found.workload}: {found.agreement} greedy tokens are the reference's own, the rest "
        f"ties of rounding; {found.checked}"
    ]
    for one in found.timed:
        step = 1e3 * statistics.median(one.step_seconds)
        line = f"{one.name:<24}{one.rate:>10.1f} tok/s{step:>9.3f} ms a step"
        if one.name != first:
            ratio, low, high = statistics.median(one.ratios), min(one.ratios), max(one.ratios)
            line += f"  {found.compared} takes {ratio:.3f} times {first} ({low:.3f} to {high:.3f})"
        lines.append(line)
    return lines


def describe_kernel(time: KernelTime) -> str:
    """One kernel, or chain of them, in words."""
    low, high = min(time.seconds), max(time.seconds)
    return (
        f"{time.name:<36}{1e6 * time.median:>9.1f} us ({1e6 * low:.1f} to {1e6 * high:.1f} in "
        f"{len(time.seconds)})  {time.fraction:.3f} of the limit"
    )


def describe_overlap(found: Overlap) -> str:
    """What host and device do at once in words."""
    phases = ", ".join(f"{name} {1e3 * t:.3f}" for name, t in found.phases.items())
    return (
        f"overlap: {found.num_requests} requests, a decode step every {1e3 * found.period:.3f} ms, "
        f"host work {1e3 * found.host:.3f} ms ({phases})"
    )


def describe_startup(seconds: list[float]) -> str:
    """Start-ups in words, the first of them with a cold kernel cache."""
    warm = statistics.median(seconds[1:])
    return f"startup: ready after {seconds[0]:.1f} s with a cold kernel cache, {warm:.1f} s warm"


def describe_promise(promised: str) -> str:
    """What the figures below it count, and the head of the table of `describe_kept`."""
    also = "" if promised == "bits" else "; on a CPU the engine promises equal tokens, not bits"
    return (
        f"exact: requests that have the same as alone{also}\n"
        f"{'':<36}{'tokens':>8}{'logprobs':>10}{'logits':>8}{'all bits':>10}"
    )


def describe_kept(kept: Kept) -> str:
    """How many requests have the same bits in a setting as alone: a row of the table."""
    total = kept.num_requests
    words = ", ".join(filter(None, (kept.note, kept.problem)))
    return (
        f"{kept.setting:<36}{f'{kept.tokens}/{total}':>8}"
        f"{f'{kept.logprobs}/{kept.num_scored}':>10}"
        f"{f'{kept.logits}/{total}':>8}{f'{kept.bits}/{total}':>10}  {words}"
    ).rstrip()


def describe_quality(dtype: str, found: Quality) -> str:
    """The engine's distance from float32 beside transformers' in 16 bits: a table."""
    rows = (
        (f"ours, {dtype}", found.kl, found.nll),
        (f"transformers, {found.dtype}", found.kl_16bit, found.nll_16bit),
        ("transformers, float32", 0.0, found.nll_float32),
    )
    return "\n".join(
        [
            f"{f'{found.num_tokens:,} tokens':<36}{'KL to float32':>14}{'NLL':>10}"
            f"{'beyond float32':>16}",
            *(
                f"{name:<36}{kl:>14.3e}{nll:>10.5f}{nll - found.nll_float32:>+16.2e}"
                for name, kl, nll in rows
            ),
            f"two standard errors of ours beyond float32: {2 * found.error:.2e}",
        ]
    )
