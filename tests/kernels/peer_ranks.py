"""One rank of an exchange through memory that processes share.

Run with TRITON_INTERPRET=1. Every rank knows all parts, so that each can check what it gets.
"""

import sys
import time
from functools import reduce
from typing import Any

import torch

from layers.kernels import peer
from layers.kernels.norm import add_rms_norm_reference
from layers.kernels.peer import PeerExchange

ROWS, WIDTH, EPS = 70, 48, 1e-5


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


def _summed(parts: torch.Tensor, dtype: torch.dtype, *, two_shot: bool) -> torch.Tensor:
    """The sum over ranks [T, WIDTH] float32 of parts [ranks, S, T, WIDTH]."""
    total = torch.zeros(parts.shape[2:])
    for part in parts:
        # In the kernel's order, for the same bits.
        total += reduce(torch.add, part).to(dtype).float()
    return total.to(dtype).float() if two_shot else total


def _check_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    if got.dtype == torch.float16:
        assert torch.equal(got, expected)
    else:
        # The interpreter cuts bf16 off instead of rounding.
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.1)


def _check_sum(exchange: PeerExchange, rank: int, size: int, source: torch.Generator) -> None:
    rows = int(torch.randint(1, 6, (), generator=source))
    splits = int(torch.randint(1, 4, (), generator=source))
    dtype = exchange._dtype
    parts = torch.randn(size, splits, rows, WIDTH, generator=source)
    # Zeros of both signs, and numbers that become zero when they are rounded.
    parts *= torch.randint(0, 2, parts.shape, generator=source)
    parts *= torch.where(torch.rand(parts.shape, generator=source) < 0.1, 1e-30, 1.0)
    if splits == 1:
        parts = parts.to(dtype).float()
    x = parts[rank] if splits > 1 else parts[rank, 0].to(dtype)
    residual = torch.randn(rows, WIDTH, generator=source).to(dtype)
    weight = torch.rand(WIDTH, generator=source).to(dtype)
    summed = _summed(parts, dtype, two_shot=exchange.two_shot(rows))
    assert exchange.takes_sum(x)
    if torch.rand((), generator=source) < 0.4:
        _check_equal(exchange.all_reduce(x), summed.to(dtype))
        return
    normed, total = exchange.add_rms_norm(x, residual, weight, EPS)
    expected = (summed + residual.float()).to(dtype)
    _check_equal(total, expected)
    reference, _ = add_rms_norm_reference(torch.zeros_like(expected), expected, weight, EPS)
    torch.testing.assert_close(normed, reference, rtol=1e-2, atol=1e-2)


def _check_max(exchange: PeerExchange, rank: int, size: int, source: torch.Generator) -> None:
    count = int(torch.randint(1, ROWS + 1, (), generator=source))
    info = torch.iinfo(torch.int64)
    x = torch.randint(info.min + 1, info.max, (size, count), generator=source)
    assert torch.equal(exchange.all_max(x[rank].contiguous()), x.amax(0)), "maximum"


def main(path: str, rank: int, size: int, dtype: torch.dtype) -> None:
    _patch_interpreter()
    count = PeerExchange.num_words(size, ROWS, WIDTH)
    memory = torch.from_file(path, shared=True, size=size * count, dtype=torch.int64)
    addresses = [memory[i * count :].data_ptr() for i in range(size)]
    exchange = PeerExchange(
        rank, addresses, rows=ROWS, width=WIDTH, dtype=dtype, device=torch.device("cpu"), pdl=False
    )
    # Both ways of summing, in turn.
    peer._TWO_SHOT_BYTES = 3 * WIDTH * 2
    shared, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(rank)
    for _ in range(16):
        time.sleep(0.02 * float(torch.rand((), generator=own)))
        check = _check_max if torch.rand((), generator=shared) < 0.2 else _check_sum
        check(exchange, rank, size, shared)
    sys.stdout.write("exchanged\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4]))
