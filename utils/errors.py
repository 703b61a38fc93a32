"""Every error a user can cause, as a type to catch.

AllmosError
├── FieldError                 something given was wrong: has .field, .value and .fix
│   ├── ConfigError            an engine option (also a ValueError)
│   └── RequestError           a prompt or its sampling parameters (also a ValueError)
│       └── RequestTooLongError    it can never fit the context window or the KV cache
├── CheckpointError            the model folder
│   ├── CheckpointNotFoundError    (also a FileNotFoundError)
│   ├── UnsupportedModelError      an architecture or feature without an implementation here
│   └── WeightsError               missing, unexpected or misshapen tensors
├── OutOfMemoryError           weights or KV cache do not fit the device (also a MemoryError)
├── StepError                  a step failed; all unfinished requests have ended
├── ContractError              a scheduler, block manager or runner broke a rule of engine/types.py
│   └── PlanError              a plan misuses a KV block: has .step_id, .request_id and .block (also
│       │                      a StepError)
│       └── KVSanitizerError   the same, or NaN in a block, found with kv_sanitizer=True
├── WorkerDiedError            the process of a tensor-parallel rank has ended by itself
└── EngineClosedError          use after close() (also a RuntimeError)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AllmosError(Exception):
    """Base of all errors raised on purpose; the tree above explains each of them."""


class FieldError(AllmosError):
    """The option, parameter or argument `field` has a `value` with a `problem`, and has a `fix`."""

    def __init__(self, field: str, value: object, problem: str, fix: str) -> None:
        super().__init__(field, value, problem, fix)
        self.field, self.value, self.problem, self.fix = field, value, problem, fix

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return f"{self.field}={shown}: {self.problem}. {self.fix}"


class ConfigError(FieldError, ValueError): ...


class RequestError(FieldError, ValueError): ...


class RequestTooLongError(RequestError): ...


class CheckpointError(AllmosError): ...


class CheckpointNotFoundError(CheckpointError, FileNotFoundError): ...


class UnsupportedModelError(CheckpointError): ...


class WeightsError(CheckpointError): ...


class OutOfMemoryError(AllmosError, MemoryError): ...


class StepError(AllmosError): ...


class ContractError(AllmosError): ...


class WorkerDiedError(AllmosError): ...


class PlanError(ContractError, StepError):
    """A step has no block for a KV position (`block` is -1), or uses one that is not its own."""

    def __init__(self, step_id: int, request_id: int, block: int, problem: str) -> None:
        super().__init__(step_id, request_id, block, problem)
        self.step_id, self.request_id = step_id, request_id
        self.block, self.problem = block, problem

    def __str__(self) -> str:
        place = f"step {self.step_id}, request {self.request_id}, block {self.block}"
        return f"{place}: {self.problem}"


class KVSanitizerError(PlanError): ...


class EngineClosedError(AllmosError, RuntimeError): ...


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known name, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
