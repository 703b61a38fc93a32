"""Runs the engine's calls of torch in torch's initial state, whatever state the caller has set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

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
)
# The library for quantized weights, which on x86 selects FBGEMM for the float16 weights of a CPU.
_QUANTIZED = (partial(getattr, quantized, "engine"), partial(setattr, quantized, "engine"))
if "x86" in quantized.supported_engines:
    _SETTINGS += ((*_QUANTIZED, ("x86", "fbgemm")),)


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


@torch.inference_mode()
def _inferred(work: Callable[[], T]) -> T:
    return work()


class TorchState:
    """Runs functions in inference mode, and apart from that in the state with which torch starts.

    Autocast, modes, transforms and the default device are states of a thread. If the caller's
    thread has any, the function runs in a thread of this object, which has none. Settings of the
    process are changed while the function runs. After that they have the caller's values again.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "step")
        self._initial = self._thread.submit(_inferred, _modes).result()

    def run(self, work: Callable[[], T]) -> T:
        """Return `work()`. This takes 9 us more than `work()`, or 120 us if the thread is used."""
        with _engine_settings():
            with torch.inference_mode():
                if _modes() == self._initial:
                    return work()
            return _ended(self._thread.submit(_inferred, work)).result()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Start `work` in the thread; if settings have to be changed, also wait for its end."""
        with _engine_settings() as changed:
            future = self._thread.submit(_inferred, work)
            return _ended(future) if changed else future

    def close(self) -> None:
        """Wait until all functions have ended."""
        self._thread.shutdown()


def _ended(future: Future[T]) -> Future[T]:
    try:
        wait((future,))
    except BaseException:
        wait((future,))  # what runs still needs the settings
        raise
    return future
