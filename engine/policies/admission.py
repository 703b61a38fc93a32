"""How many requests run at once."""

from __future__ import annotations

from bisect import bisect_left, insort

from engine.policies.base import AdmissionPolicy
from engine.running_batch import RunningBatch
from engine.sequence import Sequence


class Optimistic(AdmissionPolicy):
    """Admits whatever has blocks now; if outputs grow beyond the cache, someone is preempted."""

    name = "optimistic"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        return True


class ReserveOutput(AdmissionPolicy):
    """Admits if all running requests can reach their length limits: no one is ever preempted."""

    name = "reserve"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        held = sum(s.capacity for s in batch.running.values()) // batch.blocks.block_size
        most = sum(batch.most_blocks(s) for s in (*batch.running.values(), seq))
        return most - held <= batch.blocks.num_free_blocks


class LookAhead(AdmissionPolicy):
    """Admits if the running requests fit at every moment, each growing to its expected length.

    Of all moments to come, the worst is one at which a request ends. The idea is from
    Past-Future (Gong et al., ASPLOS 2025), which learns the expected lengths.
    """

    name = "lookahead"

    def admits(self, seq: Sequence, batch: RunningBatch) -> bool:
        size, seqs = batch.blocks.block_size, [*batch.running.values(), seq]
        # Steps to the end, and the position of the newest token; the last to end comes first.
        ends = [(s.num_expected_tokens - len(s.token_ids), len(s.token_ids) - 1) for s in seqs]
        ends.sort(reverse=True)
        full = 0
        offsets: list[int] = []
        for count, (steps, position) in enumerate(ends, 1):
            full += position // size
            insort(offsets, position % size)
            # At `steps` from now `count` requests are left, each with `steps - 1` more positions.
            more, rest = divmod(steps - 1, size)
            crossed = count - bisect_left(offsets, size - rest)
            if full + count * (more + 1) + crossed > batch.blocks.num_blocks:
                return False
        return True
