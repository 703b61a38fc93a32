"""Messages between the runner and a rank: their way through a socket, and their compact form."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import socket
import struct
from array import array
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import chain, islice
from operator import attrgetter
from typing import Any

from engine.step import BlockCopy, BlockUpdate, NewRequest, PrefillChunk, StepPlan, StepResult

_LENGTH = struct.Struct("<Q")


class Channel(socket.socket):
    """One end of a pair of sockets. It carries messages of any length in both directions."""

    def __init__(self, fileno: int) -> None:
        super().__init__(fileno=fileno)
        # The program may have called socket.setdefaulttimeout.
        self.setblocking(True)
        self._unsent = bytearray()

    def queue(self, message: bytes) -> None:
        """Have `flush` write what `encode` made, behind what it has not written yet."""
        self._unsent += _LENGTH.pack(len(message)) + message

    def flush(self) -> bool:
        """Write as much as the socket takes; False if something is left.

        What is queued is dropped if the other process has ended, as `receive` will tell.
        """
        while self._unsent:
            try:
                sent = self.send(self._unsent, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except ConnectionError:
                sent = len(self._unsent)
            del self._unsent[:sent]
        return True

    def post(self, message: bytes) -> None:
        """Write a message, and wait until the socket has taken it."""
        self.queue(message)
        while not self.flush():
            os.sched_yield()

    def receive(self) -> Any:
        """Wait for the next message; None if the other process has ended or writes no more."""
        try:
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            message = self._read(length)
        except (EOFError, ConnectionError):
            return None
        return pickle.loads(message)

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            data += (part := self.recv(length - len(data), socket.MSG_WAITALL))
            if not part:
                raise EOFError
        return data


def _flat(kind: type) -> Callable[[Any], tuple[type, tuple[Any, ...]]]:
    values = attrgetter(*(field.name for field in fields(kind)))
    return lambda message: (kind, values(message))


def _pack(result: StepResult) -> tuple[Callable[..., StepResult], tuple[Any, ...]]:
    tokens = array("q", chain.from_iterable(result.tokens))
    # Rows that failed may have no token.
    one_each = len(tokens) == len(result.tokens) and all(result.tokens)
    counts = None if one_each else [len(row) for row in result.tokens]
    return _unpack, (tokens, counts, *_BESIDE_TOKENS(result))


def _unpack(tokens: array[int], counts: list[int] | None, step_id: int, *rest: Any) -> StepResult:
    flat = iter(tokens.tolist())
    rows = [[t] for t in flat] if counts is None else [list(islice(flat, n)) for n in counts]
    return StepResult(step_id, rows, *rest)


_BESIDE_TOKENS = attrgetter(*(one.name for one in fields(StepResult) if one.name != "tokens"))
# How pickle sees these classes: a plan as its constructor's arguments (256 decodes with 16 new
# blocks take 23 us both ways, 56 by plain pickle); the tokens of a result as one array, with the
# number of tokens of each row unless all are one (256 rows: 38 us both ways, 68 by plain pickle).
_COMPACT: dict[type, Callable[[Any], Any]] = {
    StepResult: _pack,
    **{k: _flat(k) for k in (StepPlan, NewRequest, BlockUpdate, BlockCopy, PrefillChunk)},
}


def encode(message: object) -> bytes:
    """A message for `Channel.post`."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 5)
    pickler.dispatch_table = copyreg.dispatch_table | _COMPACT
    pickler.dump(message)
    return buffer.getvalue()


class PlanCodec:
    """Plans for the way, in order. A steady decode step takes a few bytes.

    Where a plan decodes the slots of the plan before, its list of slots stays behind. So a codec
    that decodes must see every message that the other one encoded.
    """

    _slots: tuple[int, ...] = ()

    def encode(self, plan: StepPlan) -> bytes:
        same = plan.decode == self._slots != ()
        self._slots = plan.decode
        return encode((replace(plan, decode=()) if same else plan, same))

    def decode(self, message: tuple[StepPlan, bool]) -> StepPlan:
        plan, same = message
        self._slots = self._slots if same else plan.decode
        return replace(plan, decode=self._slots) if same else plan
