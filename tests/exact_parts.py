"""Parts that keep all bits, or lose them in steps that a test chooses; they need no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from engine.checking.fake_runner import FakeRunner
from engine.types import StepHandle, StepPlan, StepResult
from layers.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from layers.linear import CPUMatmul, Matmul
from memory.kv_cache import KVLayer

Change = Callable[[StepPlan, StepResult], StepResult]


@dataclass(slots=True)
class _Changed(StepHandle):
    inner: StepHandle
    plan: StepPlan
    change: Change

    def result(self) -> StepResult:
        return self.change(self.plan, self.inner.result())


class RecordingRunner(FakeRunner):
    """Keeps all bits but those that `change` takes away; the plans of all steps are in `plans`."""

    name = "recording"
    plans: ClassVar[list[StepPlan]]

    @staticmethod
    def change(plan: StepPlan, result: StepResult) -> StepResult:
        return result

    def execute(self, plan: StepPlan) -> StepHandle:
        self.plans.append(plan)
        return _Changed(super().execute(plan), plan, self.change)


def recording_runner(change: Change | None = None, **attributes: Any) -> type[RecordingRunner]:
    """A class of its own, with `plans` of its own."""
    if change is not None:
        attributes["change"] = staticmethod(change)
    return type("Recording", (RecordingRunner,), {"plans": [], **attributes})


def next_float(plan: StepPlan, result: StepResult) -> StepResult:
    """The result, with log-probabilities of output tokens that are one float larger."""
    if result.logprobs is None:
        return result
    rows = [
        [{t: math.nextafter(x, 0) for t, x in one.items()} for one in r] for r in result.logprobs
    ]
    return replace(result, logprobs=rows)


def when(leaks: Callable[[StepPlan], bool], change: Change = next_float) -> Change:
    """A change of the steps for which `leaks` is True."""
    return lambda plan, result: change(plan, result) if leaks(plan) else result


class RowAttention(AttentionBackend):
    """Computes every query row by itself, so that no other row can change its bits."""

    name = "rows"

    @staticmethod
    def leaks(batch: AttentionBatch) -> bool:
        """Whether a step adds 1e-3 to its outputs."""
        return False

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec

    def prepare(self, batch: AttentionBatch) -> tuple[list[Tensor], bool]:
        size, rows = self._spec.block_size, list[Tensor]()
        starts = batch.query_start.tolist() if batch.num_prefills else []
        for i, (slot, length) in enumerate(
            zip(batch.slots.tolist(), batch.context_lens.tolist(), strict=True)
        ):
            count = starts[i + 1] - starts[i] if i < batch.num_prefills else 1
            positions = torch.arange(length)
            places = batch.block_tables[slot, positions // size].long() * size + positions % size
            rows += [places[:end] for end in range(length - count + 1, length + 1)]
        return rows, self.leaks(batch)

    def attend(self, q: Tensor, kv: KVLayer, prepared: tuple[list[Tensor], bool]) -> Tensor:
        rows, leaks = prepared
        heads, group = self._spec.num_kv_heads, self._spec.num_heads // self._spec.num_kv_heads
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2])
        for i, places in enumerate(rows):
            # Contiguous, because products may depend on strides.
            keys, values = kv.flat[places].transpose(0, 1).contiguous().chunk(2)
            query = q[i].reshape(heads, group, -1).contiguous() * self._spec.scale
            weights = (query @ keys.transpose(1, 2)).softmax(-1)
            out[i] = (weights @ values).flatten()
        return out + 1e-3 if leaks else out


@contextmanager
def exact_products() -> Iterator[pytest.MonkeyPatch]:
    """Products on the CPU compute every row by itself within."""
    multiply = CPUMatmul.__call__

    def row_by_row(self: CPUMatmul, x: Tensor, out: Tensor | None = None) -> Tensor:
        rows = [multiply(self, x[i : i + 1].clone()) for i in range(x.shape[0])]
        y = torch.cat(rows or [multiply(self, x)])
        return y if out is None else out.copy_(y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUMatmul, "__call__", row_by_row)
        patch.setattr(CPUMatmul, "added", Matmul.added)
        yield patch
