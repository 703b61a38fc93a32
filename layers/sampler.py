"""Choosing tokens from logits, with noise that depends on the request alone."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10, a counter-based generator (Salmon et al., SC 2011).

    Args:
        counter: four int64 tensors of 32-bit words that broadcast together.
        key: two int64 tensors of 32-bit words.

    Returns:
        Four int64 tensors of 32 random bits each.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit words overflows int64 into the sign; the masks undo that.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        hi0, hi1 = (p0 >> 32) & _MASK32, (p1 >> 32) & _MASK32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, p1 & _MASK32, hi0 ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for each vocabulary entry of each row.

    Entry i of a row comes from lane i % 4 of Philox with key (seed low word, seed high word)
    and counter (i // 4, position, 0, 0): u = (word / 2^8 + 1/2) / 2^24, noise = -log(-log u).

    Args:
        seeds: [R] int64, >= 0.
        positions: [R] int64 position of the token to be sampled.

    Returns:
        [R, vocab_size] float32.
    """
    index = torch.arange(-(-vocab_size // 4), device=seeds.device).unsqueeze(0)
    zero = torch.zeros_like(index)
    key = ((seeds & _MASK32).unsqueeze(1), (seeds >> 32).unsqueeze(1))
    words = torch.stack(philox4x32((index, positions.unsqueeze(1), zero, zero), key), dim=-1)
    uniform = ((words >> 8).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform)).flatten(1)[:, :vocab_size]


def sample(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """One token per row: the argmax of logits / temperature + Gumbel noise.

    That is a draw from softmax(logits / temperature) (the Gumbel-max trick). Where the
    temperature is 0 it is the argmax of the logits alone.

    Args:
        logits: [R, vocab_size].
        temperatures: [R] float32, >= 0.
        seeds: [R] int64 key of each row's noise.
        positions: [R] int64 position of the token to be sampled.

    Returns:
        [R] int64 token ids.
    """
    greedy = (temperatures == 0).unsqueeze(1)
    noise = gumbel_noise(seeds, positions, logits.shape[-1]).masked_fill(greedy, 0.0)
    scale = temperatures.unsqueeze(1).masked_fill(greedy, 1.0)
    return (logits.float() / scale + noise).argmax(-1)
