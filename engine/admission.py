"""Admission policies that estimate how many blocks the running requests will take.

A request's *length limit* is the maximum number of its prompt and output tokens. Its *expected
length* is the prompt's length plus `SamplingParams.predicted_tokens`, by default the length limit.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter
from typing import NamedTuple

from config import Config
from engine.policies import AdmissionPolicy
from engine.requests import Sequence
from engine.running_batch import RunningBatch


class ReserveOutput(AdmissionPolicy):
    """Admits a request if it and the running requests fit the cache even at their length limits."""

    name = "reserve"

    def __init__(self, config: Config) -> None:
        # For each cache group, how many blocks the running requests lack to their length limits.
        self._lacking: list[int] | None = None

    def begin_step(self, batch: RunningBatch) -> None:
        self._lacking = None

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        if self._lacking is None:
            self._lacking = [0] * len(batch.blocks.groups)
            for running in batch.running.values():
                self.admitted(running, batch)
        needs = zip(self._lacking, batch.most_blocks(seq), batch.blocks.groups, strict=True)
        return all(lacking + most <= blocks.num_free_blocks for lacking, most, blocks in needs)

    def admitted(self, seq: Sequence, batch: RunningBatch) -> None:
        if self._lacking is not None:
            held = [blocks.held(seq.request_id) for blocks in batch.blocks.groups]
            needs = zip(self._lacking, batch.most_blocks(seq), held, strict=True)
            self._lacking = [lacking + most - there for lacking, most, there in needs]


class _Course(NamedTuple):
    """How many blocks a request will hold in each step from now on. The present step is step 0."""

    steps: int  # number of steps in which the request holds blocks
    growth: int  # number of steps in which its positions grow, at most `steps`
    position: int  # the last position that has a block in step 0; one more in each step of growth

    def blocks(self, step: int, size: int) -> int:
        """Number of blocks of `size` positions in a step before the request's end."""
        return (self.position + min(step, self.growth - 1)) // size + 1


class LookAhead(AdmissionPolicy):
    """Admits a request if it and all running requests fit the cache up to their expected lengths.

    Requests take more and more blocks until one of them ends. So it is enough to look at the steps
    in which a request ends. The method is from Past-Future (Gong et al., ASPLOS 2025).

    The policy assumes that each decoding request gets one token in a step. It assumes that a prompt
    has no cached tokens, and that the present step computes one position of the prompt. In each
    later step it assumes as many positions as the budget has left after one position for each
    running request. So the policy does not expect the prompt to end too early. The policy assumes
    that the request takes blocks for its output from now on, because the prompt may end sooner than
    expected. If all expected lengths are right, no request is preempted. There are three
    exceptions: drafted tokens, prompts that wait until blocks leave their sliding window, and
    logits processors, with which a request may decode only in every other step.

    Bounds save most of the checks. For each of the step ranges [0, 1), [1, 3), [3, 7), ... the
    policy keeps a bound: a number of blocks that the running requests never exceed in these steps.
    An admission adds to each bound the largest number of blocks that the admitted request holds in
    the range. Only if a bound exceeds the cache, the policy checks the steps in which requests end.
    This check makes the bounds exact.
    """

    name = "lookahead"
    # Maximum number of checks in a step. After them requests are admitted by the bounds alone.
    # Otherwise the cost of a step would grow with the square of the number of requests. In 12
    # simulations of 1,200 to 3,000 requests, of which at most 1,024 ran, no step needed over 4.
    max_checks: int = 8

    def __init__(self, config: Config) -> None:
        self._budget = config.max_num_batched_tokens
        self.num_checks = 0  # number of checks of all ends in this step
        self._courses: list[_Course] | None = None  # of the running requests
        self._bounds: list[int] = []  # blocks in each range of steps
        self._candidate: tuple[_Course, list[int]] | None = None  # and bounds with it

    def begin_step(self, batch: RunningBatch) -> None:
        self._courses = None

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        size, most = batch.blocks.block_size, batch.blocks.num_blocks
        if self._courses is None:
            self._courses = [self._course(running, batch) for running in batch.running.values()]
            self._bounds, self.num_checks = _most_blocks(self._courses, size), 1
        new = self._course(seq, batch)
        bounds = self._bounds + [0] * (new.steps.bit_length() - len(self._bounds))
        for i in range(new.steps.bit_length()):
            bounds[i] += new.blocks(min(2 << i, new.steps + 1) - 2, size)
        if max(bounds) > most:
            if self.num_checks >= self.max_checks:
                return False
            bounds = _most_blocks([*self._courses, new], size)
            self.num_checks += 1
        self._candidate = new, bounds
        return max(bounds) <= most

    def admitted(self, seq: Sequence, batch: RunningBatch) -> None:
        if self._courses is not None and self._candidate is not None:
            new, self._bounds = self._candidate
            self._courses.append(new)

    def _course(self, seq: Sequence, batch: RunningBatch) -> _Course:
        length, end = len(seq.token_ids), seq.num_expected_tokens
        if seq.slot is not None and seq.num_scheduled >= seq.num_prefill:
            # The last output token is never computed. One more step, because this one may not
            # compute `position` yet.
            position, steps = seq.num_scheduled, end - seq.num_scheduled
        else:
            position, rate = length - 1, max(1, self._budget - len(batch.running))
            steps = -(-(length - 1) // rate) + max(1, end - length)
        return _Course(max(1, steps), max(1, min(steps, end - 1 - position)), position)


def _most_blocks(courses: list[_Course], size: int) -> list[int]:
    """Return how many blocks the requests hold at most in each of the step ranges of `LookAhead`.

    The loop goes back in time, from the last end to now. In a step, `held` is the number of blocks
    of the requests that no longer grow. The growing requests have `full` full blocks in step 0 and
    one more block each. Until a later step each of them gets `more` blocks, or `more` + 1 if its
    offset in a block and the steps since now together cross another block's end.
    """
    ends = sorted(courses, key=attrgetter("steps"))
    grows = sorted(courses, key=attrgetter("growth"))
    num_ranges = ends[-1].steps.bit_length() if ends else 0
    bounds = [0] * num_ranges
    steps = {course.steps - 1 for course in courses}.union((2 << i) - 2 for i in range(num_ranges))
    held = full = 0
    offsets: list[int] = []
    for step in sorted(steps, reverse=True):
        while ends and ends[-1].steps > step:
            course = ends.pop()
            held += course.blocks(course.steps, size)
        while grows and grows[-1].growth > step:
            course = grows.pop()
            held -= course.blocks(course.steps, size)
            full += course.position // size
            insort(offsets, course.position % size)
        more, rest = divmod(step, size)
        crossed = len(offsets) - bisect_left(offsets, size - rest)
        used = held + full + len(offsets) * (more + 1) + crossed
        place = (step + 1).bit_length() - 1
        bounds[place] = max(bounds[place], used)
    return bounds
