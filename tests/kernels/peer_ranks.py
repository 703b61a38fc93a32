"""The ranks of an exchange through memory that processes share.

`python -m tests.kernels.peer_ranks file size dtype rounds` with TRITON_INTERPRET=1.
"""

import multiprocessing
import sys
import time
from multiprocessing.connection import wait

import torch

from layers.kernels.peer import PeerExchange
from tests.kernels.interpreter import load_whole_values, patch_interpreter
from tests.kernels.peer_checks import PeerChecks

ROWS, WIDTH = 6, 48
_SECONDS = 180.0


def main(path: str, size: int, dtype: torch.dtype, rounds: int) -> int:
    """The exit status: whether all ranks ended, and well, in time."""
    patch_interpreter()
    load_whole_values()
    # Forked, since to import torch takes longer than all else here.
    make = multiprocessing.get_context("fork").Process
    ranks = [
        make(target=exchange, args=(path, i, size, dtype, rounds), daemon=True) for i in range(size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + _SECONDS
    # One that fails leaves the others waiting.
    while not any(rank.exitcode for rank in ranks) and time.monotonic() < deadline:
        running = [rank.sentinel for rank in ranks if rank.is_alive()]
        if not running:
            break
        wait(running, deadline - time.monotonic())
    return int(any(rank.exitcode != 0 for rank in ranks))


def exchange(path: str, rank: int, size: int, dtype: torch.dtype, rounds: int) -> None:
    """What one rank does."""
    count = PeerExchange.num_words(size, ROWS, WIDTH)
    memory = torch.from_file(path, shared=True, size=size * count, dtype=torch.int64)
    device = torch.device("cpu")
    peers = PeerExchange(
        rank=rank,
        addresses=[memory[i * count :].data_ptr() for i in range(size)],
        rows=ROWS,
        width=WIDTH,
        dtype=dtype,
        device=device,
        pdl=False,
        # Both ways of summing, in turn.
        two_shot_bytes=ROWS // 2 * WIDTH * dtype.itemsize,
    )
    cuts = dtype == torch.bfloat16
    PeerChecks(peers, rank, size, ROWS, WIDTH, dtype, device, cuts).run(rounds, seed=7)


if __name__ == "__main__":
    file, num_ranks, name, num_rounds = sys.argv[1:]
    sys.exit(main(file, int(num_ranks), getattr(torch, name), int(num_rounds)))
