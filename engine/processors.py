"""Logits processors: each request calls processors of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sampling_params import LogitsProcessor, SamplingParams
from utils.errors import RequestError


class OwnProcessor:
    """A logits processor of one request, made from the processor that the user gave.

    If the given object has a method `for_request`, the method makes the processor. Otherwise the
    processor is a deep copy of the object; a deep copy of a function is the function itself. So
    requests with the same SamplingParams do not share the state of a processor.
    """

    def __init__(
        self, given: Any, prompt: list[int], sample: int, outside: Callable[[], Any]
    ) -> None:
        """`outside` makes a context manager in which the processor is made and called."""
        self._outside = outside
        self._call: LogitsProcessor | None
        make = getattr(given, "for_request", None)
        try:
            with outside():
                self._call = copy.deepcopy(given) if make is None else make(list(prompt), sample)
            if not callable(self._call):
                raise TypeError(f"{self._call!r} is not callable")
        except Exception as error:  # functions of the user may raise any exception
            problem = f"a request cannot get a processor of its own ({error!r})"
            fix = "Give the object a method for_request(prompt_token_ids, sample)."
            raise RequestError("logits_processors", given, problem, fix) from error

    def __call__(self, token_ids: list[int], logits: Any) -> Any:
        call = self._call
        if call is None:
            return logits
        with self._outside():
            return call(token_ids, logits)

    def release(self) -> None:
        """Forget the processor. It will not be called again."""
        self._call = None

    def __repr__(self) -> str:
        return repr(self._call)

    def __reduce__(self) -> tuple[Any, ...]:
        return _sent_processor, (self._call,)


def _sent_processor(call: LogitsProcessor | None) -> LogitsProcessor | None:
    """Return the logits processor that a rank unpickles in place of an `OwnProcessor`."""
    return call


def own_processors(
    params: SamplingParams, prompt: list[int], sample: int, outside: Callable[[], Any]
) -> SamplingParams:
    """Return `params` with an `OwnProcessor` in place of each logits processor."""
    given = params.logits_processors
    own = tuple(OwnProcessor(one, prompt, sample, outside) for one in given)
    return replace(params, logits_processors=own)
