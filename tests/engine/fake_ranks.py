"""Ranks without a model, some of which come to grief; nothing here imports torch.

And where to find the processes of ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config
from engine.ranks.worker import LostPeerError, Rank
from engine.types import KVGeometry, ModelRunner, StepHandle, StepPlan, StepResult

GEOMETRY = KVGeometry(1, 1, 1, 16, 8, 4)


def rank_pids(others: Collection[int] = ()) -> list[int]:
    """Process ids of this process's ranks in their order.

    Args:
        others: ids of other engines' ranks, left out.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The fields after the name, which is in brackets: state, id of the parent, ...
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            command = (folder / "cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if int(parent) == os.getpid() and "engine.ranks.worker" in command:
            found.append(int(folder.name))
    return sorted(set(found) - set(others))


class UnsendableError(Exception):
    """An exception that pickles, and cannot be put together again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@dataclass(frozen=True)
class Trouble:
    """What happens to one rank, and what the others do meanwhile.

    Attributes:
        phase: "load", "step" (the one with id 2) or "close".
        kind: "raise", "raise-unsendable", "kill", "hang" or "exit".
        others: "hang", as in a collective of NCCL; or "lose", as in one of gloo.
    """

    phase: str
    rank: int
    kind: str
    others: str = "hang"

    def strike(self, phase: str, rank: Rank) -> None:
        """Called by every rank in every phase."""
        if phase != self.phase:
            return
        if rank.index != self.rank:
            if self.others == "lose":
                raise LostPeerError("connection closed by peer")
            time.sleep(3600)
        if self.others == "lose":
            # Those who only lost a peer tell first.
            time.sleep(0.3)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "exit":
            os._exit(7)
        if self.kind == "hang":
            time.sleep(3600)
        if self.kind == "raise-unsendable":
            raise UnsendableError(1, 2)
        raise ValueError(f"trouble in {phase} of rank {rank.index}")


@dataclass(frozen=True)
class FakeRank:
    """Makes a rank's runner; see `Trouble`."""

    trouble: Trouble | None = None
    step_seconds: float = 0.0

    def __call__(self, config: Config, checkpoint: Any, rank: Rank) -> ModelRunner:
        self.strike("load", rank)
        return _Runner(self, rank)

    def strike(self, phase: str, rank: Rank) -> None:
        if self.trouble is not None:
            self.trouble.strike(phase, rank)


class Talkative(FakeRank):
    """Prints while it loads, as C libraries do: to the descriptors."""

    def __call__(self, config: Config, checkpoint: Any, rank: Rank) -> ModelRunner:
        for number in (1, 2):
            os.write(number, b"a warning\n" * 10)
        return super().__call__(config, checkpoint, rank)


class StoredRank(FakeRank):
    """Meets the other rank in the file of the ranks, as a process group does."""

    def __call__(self, config: Config, checkpoint: Any, rank: Rank) -> ModelRunner:
        from torch.distributed import FileStore  # type: ignore[attr-defined]

        store = FileStore(rank.store, rank.size)
        store.set(f"address {rank.index}", "x" * 5000)
        store.wait([f"address {index}" for index in range(rank.size)])
        return super().__call__(config, checkpoint, rank)


def answer(plan: StepPlan) -> StepResult:
    """What a rank makes of a plan; depends on all that the plan says."""
    known = sum(sum(new.token_ids) for new in plan.new_requests)
    blocks = sum(sum(update.block_ids) for update in plan.block_updates)
    first = known + blocks
    # Steps beyond 10 give some requests several tokens, as speculative decoding will.
    counts = [1 + slot % 3 if plan.step_id > 10 else 1 for slot in plan.sampled_slots]
    tokens = zip(plan.sampled_slots, counts, strict=True)
    return StepResult(plan.step_id, [[slot + first] * count for slot, count in tokens], 0.0)


class _Handle(StepHandle):
    def __init__(self, plan: StepPlan, seconds: float) -> None:
        self._plan = plan
        self._end = time.monotonic() + seconds

    def result(self) -> StepResult:
        time.sleep(max(0.0, self._end - time.monotonic()))
        return answer(self._plan)

    def done(self) -> bool:
        return time.monotonic() >= self._end


class _Runner(ModelRunner):
    name = "fake_rank"

    def __init__(self, spec: FakeRank, rank: Rank) -> None:
        self._spec = spec
        self._rank = rank

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        return (GEOMETRY,)

    def execute(self, plan: StepPlan) -> StepHandle:
        if plan.step_id == 2:
            self._spec.strike("step", self._rank)
        return _Handle(plan, self._spec.step_seconds)

    def close(self) -> None:
        self._spec.strike("close", self._rank)
