"""The types of all errors that the engine raises on purpose.

AllmosError
├── FieldError                 a wrong value; has .field, .value and .fix
│   ├── ConfigError            a wrong engine option (also a ValueError)
│   └── RequestError           a wrong prompt or sampling parameter (also a ValueError)
│       └── RequestTooLongError    a request can never fit the context window or the KV cache
├── CheckpointError            the checkpoint folder is unusable
│   ├── CheckpointNotFoundError    there is no such folder (also a FileNotFoundError)
│   ├── UnsupportedModelError      the engine does not implement the model or a feature of it
│   └── WeightsError               tensors are missing, unexpected or of the wrong shape or dtype
├── OutOfMemoryError           weights, steps or KV cache do not fit the device (also a MemoryError)
├── LogitsError                a request's logits leave no choice, or its logits processor failed
├── StepError                  a step failed; all unfinished requests have ended
├── ContractError              a scheduler, block manager or runner broke a rule of engine/types.py
│   └── PlanError              a plan misuses a KV block; has .step_id, .request_id and .block (also
│       │                      a StepError)
│       └── KVSanitizerError   kv_sanitizer=True found a misused KV block, or NaN in a KV block
├── WorkerDiedError            the process of a tensor-parallel rank has ended unexpectedly
├── EngineUseError             the engine was used in a forked child process, by a function that a
│                              step runs, or copied or pickled (also a RuntimeError)
└── EngineClosedError          the engine was used after close() (also a RuntimeError)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AllmosError(Exception):
    """Base class of all errors in this file."""


class FieldError(AllmosError):
    """The option or argument `field` has a wrong `value`. `fix` says how to solve the `problem`."""

    def __init__(self, field: str, value: object, problem: str, fix: str) -> None:
        super().__init__(field, value, problem, fix)
        self.field, self.value, self.problem, self.fix = field, value, problem, fix

    def __str__(self) -> str:
        value = shown(self.value)
        value = value if len(value) <= 80 else value[:77] + "..."
        return f"{self.field}={value}: {self.problem}. {self.fix}"


class ConfigError(FieldError, ValueError): ...


class RequestError(FieldError, ValueError): ...


class RequestTooLongError(RequestError): ...


class CheckpointError(AllmosError): ...


class CheckpointNotFoundError(CheckpointError, FileNotFoundError): ...


class UnsupportedModelError(CheckpointError): ...


class WeightsError(CheckpointError): ...


class OutOfMemoryError(AllmosError, MemoryError): ...


class LogitsError(AllmosError): ...


class StepError(AllmosError): ...


class ContractError(AllmosError): ...


class WorkerDiedError(AllmosError): ...


class PlanError(ContractError, StepError):
    """A step's plan misuses the KV block `block`, or a position has no block (`block` is -1)."""

    def __init__(self, step_id: int, request_id: int, block: int, problem: str) -> None:
        super().__init__(step_id, request_id, block, problem)
        self.step_id, self.request_id = step_id, request_id
        self.block, self.problem = block, problem

    def __str__(self) -> str:
        place = f"step {self.step_id}, request {self.request_id}, block {self.block}"
        return f"{place}: {self.problem}"


class KVSanitizerError(PlanError): ...


class EngineUseError(AllmosError, RuntimeError): ...


class EngineClosedError(AllmosError, RuntimeError): ...


def shown(value: object) -> str:
    """Return `repr(value)`, or the name of the value's type if `repr` fails."""
    try:
        return repr(value)
    except Exception:  # the value may be an object of the user, whose `__repr__` may raise anything
        return f"<{type(value).__name__}>"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the closest known name, or with all known names if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
