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
    """Base of all errors raised on purpose."""


class FieldError(AllmosError):
    """A named input has an unusable value.

    Attributes:
        field: name of the option, parameter or argument.
        value: what was given.
        problem: what is wrong with it.
        fix: what to write instead.
    """

    def __init__(self, field: str, value: object, problem: str, fix: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}={shown}: {problem}. {fix}")
        self.field, self.value, self.problem, self.fix = field, value, problem, fix

    def __reduce__(self) -> tuple[type[FieldError], tuple[str, object, str, str]]:
        return type(self), (self.field, self.value, self.problem, self.fix)


class ConfigError(FieldError, ValueError):
    """An engine option is unknown, out of range or contradicts another."""


class RequestError(FieldError, ValueError):
    """A prompt or its sampling parameters cannot be served."""


class RequestTooLongError(RequestError):
    """The request exceeds the context window or the whole KV cache."""


class CheckpointError(AllmosError):
    """The model folder cannot be used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint under that path or name."""


class UnsupportedModelError(CheckpointError):
    """The architecture, or a feature its config asks for, has no implementation here."""


class WeightsError(CheckpointError):
    """The weight files do not match the architecture."""


class OutOfMemoryError(AllmosError, MemoryError):
    """Weights or KV cache do not fit the device."""


class StepError(AllmosError):
    """A step failed; all requests that had not finished have ended."""


class ContractError(AllmosError):
    """A part broke a rule of its contract; the message says which."""


class WorkerDiedError(AllmosError):
    """The process of a tensor-parallel rank was killed or crashed; the engine cannot go on."""


class PlanError(ContractError, StepError):
    """A step has no block for a KV position, or uses a block that is not its own.

    Attributes:
        step_id: the step that does, or was about to be planned.
        request_id: whose.
        block: the block; -1 if there is none.
        problem: what is wrong with it.
    """

    def __init__(self, step_id: int, request_id: int, block: int, problem: str) -> None:
        super().__init__(f"step {step_id}, request {request_id}, block {block}: {problem}")
        self.step_id, self.request_id = step_id, request_id
        self.block, self.problem = block, problem

    def __reduce__(self) -> tuple[type[PlanError], tuple[int, int, int, str]]:
        return type(self), (self.step_id, self.request_id, self.block, self.problem)


class KVSanitizerError(PlanError):
    """A KV block was misused, and `Config(kv_sanitizer=True)` found the step that did so."""


class EngineClosedError(AllmosError, RuntimeError):
    """The engine was used after close()."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known name, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
