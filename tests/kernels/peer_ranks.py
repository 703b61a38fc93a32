"""One rank of an exchange through memory that processes share.

Run with TRITON_INTERPRET=1.
"""

import sys

import torch

from layers.kernels.peer import PeerExchange
from tests.kernels.interpreter import load_whole_values, patch_interpreter
from tests.kernels.peer_checks import PeerChecks

ROWS, WIDTH = 6, 48


def main(path: str, rank: int, size: int, dtype: torch.dtype) -> None:
    patch_interpreter()
    load_whole_values()
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
