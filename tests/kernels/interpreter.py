"""Tests in Triton's interpreter, and what it needs on this numpy.

The interpreter is chosen when Triton is imported. So a file with such tests starts pytest on itself
in a process with TRITON_INTERPRET=1, and calls `patch_interpreter` there.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Marks of the tests that run in the interpreter, and of the one that starts them.
interpreted = pytest.mark.skipif(not INTERPRET, reason="runs in the interpreter's own process")
starts_interpreter = pytest.mark.skipif(
    INTERPRET or not HAS_TRITON, reason="needs triton, and is no test of the interpreter's process"
)


if INTERPRET and HAS_TRITON:
    # Not what `from triton.language.extra import cuda` gives.
    cuda: Any = importlib.import_module("triton.language.extra.cuda")
    # Programs run one after the other: there is nothing to wait for. Kernels import these by name.
    cuda.gdc_wait = cuda.gdc_launch_dependents = lambda: None


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it torch fills the memory of new tensors with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_in_interpreter(file: str, marks: str = "not slow") -> None:
    """Run the tests of a file with these marks, in a process with the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, file], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def patch_interpreter() -> None:
    """One-element arrays as integers, products in order, a language patched once for a kernel."""
    _take_one_element_arrays()
    _ignore_nan()
    _patch_language_once()
    _multiply_as_tensor_cores()


def _take_one_element_arrays() -> None:
    """Triton 3.6 passes them to int(), which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _ignore_nan() -> None:
    """On a GPU a maximum of a number and NaN is the number, unless the kernel asks for NaN."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def _patch_language_once() -> None:
    """Triton does it at every call inside a kernel too: half of the time of our tests."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_new(fn: Any) -> Any:
        names = fn.__globals__.values()
        seen = [lang for lang in (tl, tl.core) if any(value is lang for value in names)]
        if any(tl.core.is_builtin(lang.load) for lang in seen):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_new


def _multiply_as_tensor_cores() -> None:
    """Products in steps of 16, whatever the shape is. The order of numpy's sums depends on it."""
    import numpy as np
    from triton.runtime import interpreter

    def multiply(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        # The 16 products of a step are added in float64, where hardly any sum is rounded.
        total, left, right = d.data, a.data.astype(np.float64), b.data.astype(np.float64)
        for step in range(0, left.shape[-1], 16):
            product = left[..., step : step + 16] @ right[..., step : step + 16, :]
            total = (total + product).astype(d.data.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = multiply


def load_whole_values() -> None:
    """It copies 16 bits in two overlapping pieces, between which another process may write."""
    from triton.runtime import interpreter

    load = interpreter.InterpreterBuilder.create_masked_load

    def whole_load(self: Any, *args: Any) -> Any:
        got = load(self, *args)
        is_volatile = args[-1]
        while is_volatile and (got.data != (again := load(self, *args)).data).any():
            got = again
        return got

    interpreter.InterpreterBuilder.create_masked_load = whole_load
