"""Plans on their way to the ranks: a ring of bytes in shared memory, and their compact form.

The memory has no name (an unlinked file), so it collides with nothing, nobody else can open it,
and nothing is left behind however the processes end.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

from engine.types import BlockCopy, BlockUpdate, NewRequest, PrefillChunk, StepPlan

# Capacity: some steps with long prompts, at up to 5 bytes a token. Longer messages stream through.
_RING_BYTES = 1 << 20
# Each counter has a cache line to itself, so that readers do not slow each other down.
_LINE = 64
_LENGTH = struct.Struct("<Q")


def shared_file() -> IO[bytes]:
    """An empty file in memory without a name; processes share it by inheriting its descriptor."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryFile(dir=memory if memory.is_dir() else None)


class Ring:
    """Bytes from one writer to several readers, each of whom acknowledges what it has read.

    Counters of bytes written, and of bytes read by each reader, only grow; byte n lies at n
    modulo the capacity. A counter is written by one side alone, as one aligned word.

    Args:
        file: from `shared_file`; all sides open the same one with the same numbers.
        num_readers: every message goes to all of them.
        capacity: bytes under way at most.
    """

    def __init__(self, file: int, num_readers: int, capacity: int = _RING_BYTES) -> None:
        # Bytes written; then bytes read by, and a flag of, each reader.
        header = _LINE * (1 + 2 * num_readers)
        self._map = mmap.mmap(file, header + capacity)
        self._words = memoryview(self._map)[:header].cast("Q")[:: _LINE // 8]
        self._data = memoryview(self._map)[header:]
        self._num_readers = num_readers
        self._capacity = capacity
        self._lock = threading.Lock()

    @staticmethod
    def allocate(file: IO[bytes], num_readers: int, capacity: int = _RING_BYTES) -> None:
        """Give a new file the size of a ring; once, before anyone opens it."""
        file.truncate(_LINE * (1 + 2 * num_readers) + capacity)

    def close(self) -> None:
        """Unmap the memory; the ring must not be used any more."""
        self._words.release()
        self._data.release()
        self._map.close()

    def send(
        self, message: bytes, *, wake: Callable[[int], None], wait: Callable[[], None]
    ) -> None:
        """Write a message of any length.

        Args:
            wake: called with the index of a reader that sleeps and has something to read now.
            wait: called while the ring is full; may raise, which leaves the ring unusable.
        """
        rest = memoryview(_LENGTH.pack(len(message)) + message)
        while rest:
            written = self._words[0]
            slowest = min(self._words[1 + i] for i in range(self._num_readers))
            size = self._span(written, min(len(rest), self._capacity - (written - slowest)))
            if not size:
                wait()
                continue
            at = written % self._capacity
            self._data[at : at + size] = rest[:size]
            rest = rest[size:]
            self._store(0, written + size)
            for reader in range(self._num_readers):
                if self._words[1 + self._num_readers + reader]:
                    self._store(1 + self._num_readers + reader, 0)
                    wake(reader)

    def readable(self, reader: int) -> bool:
        """Whether a message has begun to arrive."""
        return self._words[0] != self._words[1 + reader]

    def receive(self, reader: int) -> bytes:
        """The next message, of which something is `readable`."""
        (length,) = _LENGTH.unpack(self._read(reader, _LENGTH.size))
        return self._read(reader, length)

    def sleeps(self, reader: int, flag: bool) -> None:
        """Ask the writer to `wake` this reader, or not to."""
        self._store(1 + self._num_readers + reader, int(flag))

    def _read(self, reader: int, length: int) -> bytes:
        message = bytearray()
        while len(message) < length:
            read = self._words[1 + reader]
            size = self._span(read, min(length - len(message), self._words[0] - read))
            if not size:
                # The writer is in the middle of the message, or waits for a slower reader.
                time.sleep(0)
                continue
            at = read % self._capacity
            message += self._data[at : at + size]
            self._store(1 + reader, read + size)
        return bytes(message)

    def _span(self, position: int, size: int) -> int:
        """Bytes of `size` that lie in one piece from `position` on."""
        return min(size, self._capacity - position % self._capacity)

    def _store(self, index: int, value: int) -> None:
        # Taking a lock orders the memory accesses before and after it, which a plain store does
        # not on every processor.
        with self._lock:
            self._words[index] = value
        with self._lock:
            pass


@dataclass(frozen=True, slots=True)
class SameDecodes:
    """A plan that decodes the slots that the plan before it decoded; its own list is empty."""

    plan: StepPlan


@dataclass(frozen=True, slots=True)
class Close:
    """The last message: finish what is under way and end."""


def _flat(kind: type) -> Callable[[Any], tuple[type, tuple[Any, ...]]]:
    values = attrgetter(*(field.name for field in fields(kind)))
    return lambda message: (kind, values(message))


# A dataclass as its constructor's arguments. Plain pickle takes three times as long: 28 us against
# 10 to write and 28 against 13 to read a plan of 256 decodes with 16 new blocks.
_COMPACT: dict[type, Callable[[Any], Any]] = {
    kind: _flat(kind) for kind in (StepPlan, NewRequest, BlockUpdate, BlockCopy, PrefillChunk)
}


class PlanEncoder:
    """Plans as bytes; a steady decode step as a few."""

    def __init__(self) -> None:
        self._decode: tuple[int, ...] = ()

    def __call__(self, message: StepPlan | Close) -> bytes:
        packed: StepPlan | Close | SameDecodes = message
        if isinstance(message, StepPlan):
            if message.decode and message.decode == self._decode:
                packed = SameDecodes(replace(message, decode=()))
            self._decode = message.decode
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, 5)
        pickler.dispatch_table = _COMPACT
        pickler.dump(packed)
        return buffer.getvalue()


class PlanDecoder:
    """The other end of a `PlanEncoder`; it has to see every message."""

    def __init__(self) -> None:
        self._decode: tuple[int, ...] = ()

    def __call__(self, data: bytes) -> StepPlan | Close:
        match pickle.loads(data):
            case Close() as message:
                return message
            case SameDecodes(plan):
                return replace(plan, decode=self._decode)
            case StepPlan() as plan:
                self._decode = plan.decode
                return plan
            case other:
                raise AssertionError(f"no message of the transport: {other!r}")
