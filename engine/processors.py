"""Logits processors: each request calls processors of its own."""

from __future__ import annotations

import copy
import pickle
import pickletools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from sampling_params import LogitsProcessor, SamplingParams
from utils.errors import RequestError, shown


class OwnProcessor:
    """A logits processor of one request, and the context manager in which it is called.

    Args:
        call: the processor.
        outside: makes the context manager. Pickle leaves `outside` out.
    """

    def __init__(self, call: LogitsProcessor, outside: Callable[[], Any] = nullcontext) -> None:
        self.call: LogitsProcessor | None = call  # None after `release`
        self._outside = outside
        self._data: bytes | None = None  # `call` as pickle has encoded it

    def __call__(self, token_ids: list[int], logits: Any) -> Any:
        call = self.call
        if call is None:
            return logits
        with self._outside():
            return call(token_ids, logits)

    def release(self) -> None:
        """Forget the processor. It will not be called again."""
        self.call = self._data = None

    def __repr__(self) -> str:
        return repr(self.call)

    def __reduce__(self) -> tuple[Any, ...]:
        # As bytes, so that a rank can read the message although it cannot make the processor.
        return _received, (self._data or pickle.dumps(self.call),)

    def check_picklable(self) -> None:
        """Encode the processor for ranks. Raises an exception if that or decoding fails."""
        self._data = pickle.dumps(self.call)
        # A rank's process cannot unpickle a function of __main__: the process has another __main__.
        if any(text == "__main__" for _, text, _ in pickletools.genops(self._data)):
            raise TypeError("it is of the module __main__")
        pickle.loads(self._data)


def _received(data: bytes) -> OwnProcessor:
    """Return the processor in `data`. If it cannot be unpickled, return one that always fails."""
    try:
        return OwnProcessor(pickle.loads(data))
    except (Exception, SystemExit) as error:  # unpickling a user's object may raise anything
        return OwnProcessor(_NotReceived(shown(error)))


class _NotReceived:
    def __init__(self, error: str) -> None:
        self._error = error

    def __call__(self, token_ids: list[int], logits: Any) -> Any:
        raise ImportError(f"a rank did not get the processor: {self._error}")


def own_processors(
    params: SamplingParams,
    prompt: list[int],
    sample: int,
    outside: Callable[[], Any],
    *,
    sent: bool,
) -> SamplingParams:
    """Return `params` with an `OwnProcessor` in place of each logits processor.

    If the user's object has a method `for_request`, the method makes the processor. Otherwise the
    processor is a deep copy of the object; a deep copy of a function is the function itself. So
    requests with the same SamplingParams do not share the state of a processor.

    Args:
        outside: makes a context manager in which the processors are made and called.
        sent: whether the processors are sent to the processes of ranks.

    Raises a RequestError if a processor cannot be made, called or sent.
    """
    own = []
    for given in params.logits_processors:
        try:
            with outside():
                make = getattr(given, "for_request", None)
                call = copy.deepcopy(given) if make is None else make(list(prompt), sample)
            if not callable(call):
                raise TypeError(f"{shown(call)} is not callable")
        except Exception as error:  # functions of the user may raise any exception
            problem = f"a request cannot get a processor of its own ({shown(error)})"
            fix = "Give the object a method for_request(prompt_token_ids, sample)."
            raise RequestError("logits_processors", given, problem, fix) from error
        own.append(OwnProcessor(call, outside))
        if sent:
            try:
                own[-1].check_picklable()
            except Exception as error:  # pickling a user's object may raise any exception
                problem = f"the ranks cannot be sent it ({shown(error)})"
                fix = "Use functions and classes of a module, or tensor_parallel_size=1."
                raise RequestError("logits_processors", given, problem, fix) from error
    return replace(params, logits_processors=tuple(own))
