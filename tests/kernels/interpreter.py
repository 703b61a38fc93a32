"""What Triton's interpreter needs on this numpy; for processes with TRITON_INTERPRET=1."""

from typing import Any


def patch_interpreter() -> None:
    """Triton 3.6 passes one-element arrays to int(), which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


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
