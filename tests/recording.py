"""A runner that keeps the logits of every position it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from engine.model_runner import LocalRunner
from engine.step_handles import StepOutput
from engine.types import StepPlan
from models.base import ForwardBatch

# (request id, position) -> logits [vocab_size]
Logits = dict[tuple[int, int], Tensor]


class _AllRows:
    """A model that computes the logits of all rows, and returns those that were wanted."""

    def __init__(self, model: Any, keep: Callable[[ForwardBatch, Tensor], None]) -> None:
        self._model = model
        self._keep = keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        logits, states = self._model(replace(batch, sampled_rows=None))
        self._keep(batch, logits)
        wanted = slice(None) if batch.sampled_rows is None else batch.sampled_rows
        return logits[wanted], states[wanted]

    def states(self, batch: ForwardBatch) -> Tensor:
        states: Tensor = self._model.states(replace(batch, sampled_rows=None))
        self._keep(batch, self._model.head(states))
        return states if batch.sampled_rows is None else states[batch.sampled_rows]


class RecordingRunner(LocalRunner):
    """The real runner, between whose model and sampler `logits` are copied."""

    name = "recording"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logits: Logits = {}
        self.plans: list[StepPlan] = []
        self._requests: dict[int, int] = {}
        self._pass.model = cast(Any, _AllRows(self._pass.model, self._keep))

    def _run(self, plan: StepPlan) -> StepOutput:
        self.plans.append(plan)
        self._requests |= {new.slot: new.request_id for new in plan.new_requests}
        return super()._run(plan)

    def _keep(self, batch: ForwardBatch, logits: Tensor) -> None:
        plan = self.plans[-1]
        slots = [c.slot for c in plan.prefill for _ in range(c.num_tokens)] + list(plan.decode)
        positions = batch.rotations[0].positions.tolist()
        for slot, position, row in zip(slots, positions, logits.clone(), strict=True):
            self.logits[self._requests[slot], position] = row
