"""Sampling of tokens from logits, with noise that depends only on a seed, the position and token.

The noise comes from Philox4x32-10 (Salmon et al., SC 2011), a counter-based generator. So the noise
is the same in every batch, on every device, and for any split of the vocabulary over ranks.
For a token, Philox gets the key (low 32 bits of the seed, high 32 bits of the seed) and the counter
(token // 4, position, sample, kind). `sample` is the index of the output among the outputs of its
prompt, and `kind` is the seed's `SeedKind`. So the outputs of a prompt do not share noise. Neither
do a seed that a user gave and an equal seed that the engine derived. Word number token % 4 of
Philox's output gives the random number u = ((word >> 9) + 1/2) / 2^23, and the noise is
-log(-log(u)). The number u has 23 random bits. With 24 bits u would round to 1 once in 2^24 draws,
and the noise would be infinite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from layers.logits import key_tokens, key_values, token_keys
from layers.parallel import Place
from layers.step_rows import SampledRows

NO_TOKEN = -1  # sampled token of a row whose logits have a NaN or are all -inf

_MASK32 = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return Philox's 4 output words. Each int64 element of a tensor is one 32-bit word."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit words may overflow to a negative int64, but its bits are correct.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        hi_even, hi_odd = (even >> 32) & _MASK32, (odd >> 32) & _MASK32
        c0, c1, c2, c3 = hi_odd ^ c1 ^ k0, odd & _MASK32, hi_even ^ c3 ^ k1, even & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def gumbel_noise(
    seeds: Tensor, positions: Tensor, vocab_size: int, vocab_offset: int = 0
) -> Tensor:
    """Return standard Gumbel noise, float32 [R, vocab_size], for R pairs of seed and position.

    `seeds` is int64 [R, 2], as in `SampledRows`.
    """
    first = vocab_offset // 4
    groups = torch.arange(first, first + -(-vocab_size // 4), device=seeds.device).unsqueeze(0)
    words = torch.stack((seeds & _MASK32, (seeds >> 32) & _MASK32), dim=-1).flatten(1)
    *key, sample, kind = words.unsqueeze(-1).unbind(1)
    counter = (groups, positions.long().unsqueeze(1), sample, kind)
    words = torch.stack(philox4x32(counter, (key[0], key[1])), dim=-1).flatten(1)[:, :vocab_size]
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def sample_shard(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    vocab_offset: int = 0,
    least: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a token per row: the argmax of score = logit + temperature * noise (Gumbel-max).

    Args:
        logits: any float dtype, [R, number of tokens]; the columns have consecutive token ids.
        temperatures: float32 [R], >= 0.
        seeds: each row's seed, sample and kind as in `SampledRows`, int64 [R, 2].
        positions: position of each row's sampled token, integers [R].
        vocab_offset: token id of the first column of `logits`, a multiple of 4.
        least: float32 [R]; a token whose logit is below its row's `least` is never sampled.

    Returns each row's largest score, float32 [R], and the token with this score, int64 [R]. If
    several tokens of a row have the largest score, the token with the lowest id is returned. If a
    logit is NaN, the score is NaN. If the score is NaN or -inf, there is no choice, and the token
    is `NO_TOKEN`.
    """
    noise = gumbel_noise(seeds, positions, logits.shape[1], vocab_offset)
    if least is not None:
        logits = logits.masked_fill(logits < least.unsqueeze(1), float("-inf"))
    # `addcmul` may round the product for some elements and not for others, by their place.
    scores = logits.float() + noise * temperatures.unsqueeze(1)
    best, column = scores.max(dim=1)
    return best, _chosen(best, column + vocab_offset)


def _chosen(best: Tensor, tokens: Tensor) -> Tensor:
    """Return `tokens`, int64 [R], with `NO_TOKEN` where `best` [R] is NaN or -inf."""
    return torch.where(best > float("-inf"), tokens, NO_TOKEN)


class Sampler:
    """Samples from logits whose columns are divided over ranks. Padding columns must be -inf."""

    def __init__(self, place: Place, vocab_size: int | None = None) -> None:
        self._parallel, self._vocab_size = place.parallel, vocab_size
        self._sample: Callable[..., tuple[Tensor, Tensor]] = sample_shard
        if place.fused:
            from layers.kernels import sampling

            self._sample = sampling.sample_shard

    def __call__(
        self, logits: Tensor, sampled: SampledRows, *, least: Tensor | None = None
    ) -> Tensor:
        """Sample a token per row, int64 [R]. `least` has each row's lowest allowed logit."""
        keys = sampled.temperatures, sampled.seeds, sampled.positions
        first = self._parallel.rank * logits.shape[1]
        return self._agreed(*self._sample(logits, *keys, vocab_offset=first, least=least))

    def greedy(self, logits: Tensor) -> Tensor:
        """Return each row's most likely token, which `__call__` returns at temperature 0."""
        # `argmax` takes a NaN for the largest value.
        if self._parallel.size == 1:
            tokens = logits.argmax(-1)
            return _chosen(logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), tokens)
        best, column = logits.max(-1)
        return self._agreed(best.float(), column + self._parallel.rank * logits.shape[1])

    def gathered(self, logits: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary on every rank, gathered from all ranks."""
        if self._parallel.size == 1:
            return logits
        whole = self._parallel.all_gather(logits).transpose(0, 1)
        return whole.flatten(1)[:, : self._vocab_size]

    def whole(self, logits: Tensor, sampled: SampledRows, *, least: Tensor | None) -> Tensor:
        """Sample like `__call__`, but from logits of the whole vocabulary (see `gathered`)."""
        keys = sampled.temperatures, sampled.seeds, sampled.positions
        return self._sample(logits, *keys, least=least)[1]

    def _agreed(self, best: Tensor, tokens: Tensor) -> Tensor:
        """Return each row's token with the highest score on any rank; on a tie the lowest id."""
        if self._parallel.size == 1:
            return tokens
        # Each rank puts a row's score and token into one int64, and `all_max` finds the largest.
        winner = self._parallel.all_max(token_keys(best, tokens.clamp(min=0)))
        return _chosen(key_values(winner), key_tokens(winner))
