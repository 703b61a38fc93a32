"""One rank of an exchange through memory that processes share.

Run with TRITON_INTERPRET=1.
"""

import sys
from typing import Any

import torch

from layers.kernels.peer import PeerExchange
from tests.kernels.peer_checks import PeerChecks

ROWS, WIDTH = 6, 48


def _patch_interpreter() -> None:
    # Triton 3.6 passes one-element arrays to int(), which numpy 2.4 refuses.
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    load = interpreter.InterpreterBuilder.create_masked_load

    def whole_load(self: Any, *args: Any) -> Any:
        """It copies 16 bits in two overlapping pieces, between which a peer may write."""
        got = load(self, *args)
        is_volatile = args[-1]
        while is_volatile and (got.data != (again := load(self, *args)).data).any():
            got = again
        return got

    interpreter.InterpreterBuilder.create_masked_load = whole_load


def main(path: str, rank: int, size: int, dtype: torch.dtype) -> None:
    _patch_interpreter()
    count = PeerExchange.num_words(size, ROWS, WIDTH)
    memory = torch.from_file(path, shared=True, size=size * count, dtype=torch.int64)
    device = torch.device("cpu")
    exchange = PeerExchange(
        rank,
        [memory[i * count :].data_ptr() for i in range(size)],
        rows=ROWS,
        width=WIDTH,
        dtype=dtype,
        device=device,
        pdl=False,
        # Both ways of summing, in turn.
        two_shot_bytes=ROWS // 2 * WIDTH * dtype.itemsize,
    )
    # The interpreter cuts bf16 off instead of rounding.
    exact = dtype == torch.float16
    PeerChecks(exchange, rank, size, ROWS, WIDTH, dtype, device, exact).run(16, seed=7)
    sys.stdout.write("exchanged\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4]))
