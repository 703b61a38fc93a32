"""Runs the engine's calls of torch in torch's initial state, whatever state the caller has set."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from torch import _C
from torch.backends import cuda, mkldnn, quantized

T = TypeVar("T")


def _set_precision(matmul: Any, value: str) -> None:
    # A value that was read may be inherited from a general setting. Then "none" restores it.
    matmul.fp32_precision = "none"
    if matmul.fp32_precision != value:
        matmul.fp32_precision = value


def _precision(name: str, backend: Any) -> tuple[Callable[[], str], Callable[[str], None]]:
    read = partial(_C._get_fp32_precision_getter, name, "matmul")
    return read, partial(_set_precision, backend.matmul)


def _matmul(name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return getattr(_C, f"_get_cublas_{name}"), partial(setattr, cuda.matmul, name)


# On x86, the library for quantized weights selects FBGEMM for the float16 weights of a CPU.
_QUANTIZED = (partial(getattr, quantized, "engine"), partial(setattr, quantized, "engine"))

# Settings of the process that select or forbid kernels. A setting has a function that reads it, a
# function that writes it, and the values that give the engine's results, first the one to write.
# torch reads a reduction as a pair, whose second value allows split-K, or as its first value.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any], tuple[Any, ...]], ...] = (
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, (0,)),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, (True,)),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, (True,)),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp, (True,)),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, (True,)),
    (
        _C._get_blas_preferred_backend,
        cuda.preferred_blas_library,
        (_C._BlasBackend.Default, _C._BlasBackend.Cublas),
    ),
    (*_matmul("allow_bf16_reduced_precision_reduction"), (True, (True, True))),
    (*_matmul("allow_fp16_reduced_precision_reduction"), (True, (True, True))),
    (*_matmul("allow_fp16_accumulation"), (False,)),
    (*_precision("cuda", cuda), ("ieee", "none")),
    (*_precision("mkldnn", mkldnn), ("ieee", "none")),
    (_C._get_mkldnn_enabled, partial(setattr, mkldnn, "enabled"), (True,)),
    *([(*_QUANTIZED, ("x86", "fbgemm"))] if "x86" in quantized.supported_engines else []),
)


@contextmanager
def _engine_settings() -> Iterator[bool]:
    """Give the engine's values to the settings for a while; yield whether any had another value."""
    foreign = [
        (write, value, good[0]) for read, write, good in _SETTINGS if (value := read()) not in good
    ]
    try:
        for write, _, ours in foreign:
            write(ours)
        yield bool(foreign)
    finally:
        for write, theirs, _ in reversed(foreign):
            write(theirs)


def _modes() -> tuple[int, int, int]:
    """Return numbers that change if autocast, a mode, a transform or a default device is set."""
    included, excluded = _C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set()
    # Function modes, among them a default device, have no dispatch key. All others have keys.
    return included.raw_repr(), excluded.raw_repr(), _C._len_torch_function_stack()


def _inferred(work: Callable[[], T]) -> T:
    with _C._InferenceMode(True):
        return work()


class Pending(Generic[T]):
    """The result of a function that another thread may still run.

    Ctrl-C cannot stop the wait of this class half-way, as it can that of `Future`, which waits in a
    `threading.Condition`.
    """

    def __init__(self) -> None:
        self._running = threading.Lock()
        self._running.acquire()
        self._value: Any = None
        self._error: BaseException | None = None
        self._ended = False

    @staticmethod
    def of(value: T) -> Pending[T]:
        """Return the result of a function that has returned `value`."""
        pending: Pending[T] = Pending()
        pending._end(value, None)
        return pending

    @staticmethod
    def failed(error: Exception) -> Pending[Any]:
        """Return the result of a function that has raised `error`."""
        pending: Pending[Any] = Pending()
        pending._end(None, error)
        return pending

    def run(self, work: Callable[[], T]) -> None:
        """Run the function. Not for the main thread: its Ctrl-C would become the result."""
        try:
            self._end(work(), None)
        except BaseException as error:
            self._end(None, error)

    def _end(self, value: Any, error: BaseException | None) -> None:
        self._value, self._error, self._ended = value, error, True
        self._running.release()

    def wait(self) -> None:
        """Wait until the function has ended."""
        with self._running:
            pass

    def result(self) -> T:
        """Wait until the function has ended. Return its value, or raise its exception."""
        self.wait()
        if self._error is not None:
            raise self._error
        value: T = self._value
        return value

    def done(self) -> bool:
        return self._ended


_Work = tuple[Pending[Any], Callable[[], Any]]


class StepThread:
    """A thread that runs functions one after the other, in inference mode.

    `ThreadPoolExecutor` takes no function once the main thread has ended, but other threads of the
    process may use the engine longer. The thread of this class ends after all of these threads.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        thread = threading.Thread(target=_serve, args=(self._queue,), name="step", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _stop, self._queue, thread)

    def submit(self, work: Callable[[], T]) -> Pending[T]:
        """Start `work` when all functions before it have ended."""
        if not self._end.alive:
            raise RuntimeError("submit() after close()")
        pending: Pending[T] = Pending()
        self._queue.put((pending, work))
        return pending

    def close(self) -> None:
        """Wait until all functions have ended, and end the thread."""
        self._end()


def _serve(queue: SimpleQueue[_Work | None]) -> None:
    while (item := queue.get()) is not None:
        pending, work = item
        pending.run(partial(_inferred, work))
        del item, pending, work  # they would live until the next function comes


def _stop(queue: SimpleQueue[_Work | None], thread: threading.Thread) -> None:
    queue.put(None)
    # The garbage collector may call this function in the thread itself.
    if thread is not threading.current_thread():
        thread.join()


class TorchState:
    """Runs functions in inference mode, and apart from that in the state with which torch starts.

    Autocast, modes, transforms and the default device are states of a thread. If the caller's
    thread has any, the function runs in a thread of this object, which has none. Settings of the
    process are changed while the function runs. After that they have the caller's values again.
    """

    def __init__(self) -> None:
        self._thread = StepThread()
        self._initial = self._thread.submit(_modes).result()

    def run(self, work: Callable[[], T]) -> T:
        """Return `work()`. This takes 4 us more than `work()`, or 56 us if the thread is used."""
        with _engine_settings():
            # Ctrl-C could stop the Python code of `torch.inference_mode()` half-way. The mode would
            # change when its guard is freed, for example in the middle of a later step.
            with _C._InferenceMode(True):
                if _modes() == self._initial:
                    return work()
            return _ended(self._thread.submit(work)).result()

    def submit(self, work: Callable[[], T]) -> Pending[T]:
        """Start `work` in the thread; if settings have to be changed, also wait for its end."""
        with _engine_settings() as changed:
            pending = self._thread.submit(work)
            return _ended(pending) if changed else pending

    def close(self) -> None:
        """Wait until all functions have ended."""
        self._thread.close()


def _ended(pending: Pending[T]) -> Pending[T]:
    try:
        pending.wait()
    except BaseException:
        pending.wait()  # what runs still needs the settings
        raise
    return pending
