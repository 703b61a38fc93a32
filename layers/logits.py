"""Penalties, filters and log-probabilities (scores) for logits of R rows and V tokens.

A row predicts one token, V is the vocabulary's size. Penalties precede filters, as in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layers.kernels.launch import has_triton

# Maximum number of rows that `score` handles at a time, to limit the memory for copies of logits.
SCORED_ROWS = 128
# `score` adds exponentials, which are at most 1, as integers in this unit. Rounding changes the sum
# of 151,936 of them by at most 7e-8. A sum of up to 2^23 of them fits into an int64.
UNIT = 2.0**-40

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Filters:
    """Temperatures and filter settings of R rows, for `logit_bounds`; each is float32 [R]."""

    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Arguments of `penalize`: strengths of the penalties of R rows, each float32 [R]."""

    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of one token per row, [R], and of each row's N likeliest tokens, [R, N].

    `ranks` are those of the token and of the N tokens, int64 [R, 1 + N], or [R, 0] if nobody asked.
    A token's rank is the number of tokens with a larger logit in its row, plus 1.
    """

    tokens: Tensor
    values: Tensor
    top_tokens: Tensor
    top_values: Tensor
    ranks: Tensor

    def pinned(self) -> TokenScores:
        """Return copies in pinned host memory, as NumPy arrays. The host does not wait for them."""

        def copied(x: Tensor) -> Any:
            target = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            return target.copy_(x, non_blocking=True).numpy()

        return TokenScores(*(copied(getattr(self, name)) for name in self.__slots__))


def penalize(
    logits: Tensor, tokens: Tensor, num_prompt: Tensor, num_tokens: Tensor, by: Penalties
) -> None:
    """Penalise the tokens that each row's request has so far: change `logits` [R, V] in place.

    The repetition penalty is CTRL's (Keskar et al., 2019) and applies to tokens of prompt and
    output. The presence and frequency penalties are OpenAI's and apply to tokens of the output.

    Args:
        tokens: token ids of prompt and output, then ignored entries, integers [R, any length].
        num_prompt, num_tokens: length of prompt, and of prompt plus output, integers > 0 [R].
    """
    at = torch.arange(tokens.shape[1], device=tokens.device)
    known = at < num_tokens.unsqueeze(1)
    output = known & (at >= num_prompt.unsqueeze(1))
    # Replace ignored entries by the row's first token: all its copies write the same new logit.
    ids = torch.where(known, tokens, tokens[:, :1]).long()
    counts = torch.zeros_like(logits).scatter_add_(1, ids, output.float()).gather(1, ids)
    old, repetition = logits.gather(1, ids), by.repetition.unsqueeze(1)
    new = torch.where(old > 0, old / repetition, old * repetition)
    new -= counts * by.frequency.unsqueeze(1)
    new -= (counts > 0) * by.presence.unsqueeze(1)
    logits.scatter_(1, ids, new)


def forbid(logits: Tensor, rows: Tensor, tokens: Tensor, when: Tensor) -> None:
    """Set `logits[rows[i], tokens[i]]` to -inf for each i for which `when[i]` is True, in place.

    `logits` is contiguous [R, V]; `rows` and `tokens` are int64 [N], `when` is bool [N]. Several i
    may name the same logit. A NaN stays a NaN.
    """
    least = torch.where(when, float("-inf"), float("inf")).to(logits.dtype)
    # Of several values for one logit the smallest is kept, so their order does not matter.
    logits.view(-1).scatter_reduce_(0, rows * logits.shape[1] + tokens, least, "amin")


def logit_bounds(logits: Tensor, filters: Filters) -> Tensor:
    """Return each row's smallest logit that passes the row's filters, float32 [R]."""
    if logits.is_cuda and has_triton():
        from layers.kernels import logit_bounds as kernel

        return kernel.logit_bounds(logits, filters)
    return logit_bounds_reference(logits, filters)


def logit_bounds_reference(logits: Tensor, filters: Filters) -> Tensor:
    """Do what `logit_bounds` does, by sorting. Rows with temperature 0 are not filtered.

    First, top_k keeps the k likeliest tokens, or all tokens if k < 1 (Fan et al., 2018). Second,
    top_p keeps the likeliest of these until their probabilities sum to p (Holtzman et al., 2020).
    Third, min_p drops tokens below min_p times the highest probability (Nguyen et al., 2024).
    """
    ordered = logits.float().sort(dim=1, descending=True).values
    highest, greedy = ordered[:, :1], filters.temperatures == 0
    # Temperatures are kept above 0, since 0 / 0 in the division below would give NaN.
    temperature = torch.where(greedy, 1.0, filters.temperatures).clamp(min=1e-30).unsqueeze(1)
    kept = torch.where(filters.top_k < 1, logits.shape[1], filters.top_k).long()
    least_k = ordered.gather(1, (kept.clamp(max=logits.shape[1]) - 1).unsqueeze(1))
    # Logits / temperature could overflow, so the largest logit is subtracted first.
    shifted = torch.where(ordered >= least_k, (ordered - highest) / temperature, float("-inf"))
    probability = shifted.softmax(dim=1)
    before = probability.cumsum(1) - probability
    inside = (before < filters.top_p.unsqueeze(1)) | (filters.top_p.unsqueeze(1) >= 1)
    last = inside.sum(1, keepdim=True).clamp(min=1) - 1
    least_p = ordered.gather(1, last)
    least_min = highest + temperature * filters.min_p.unsqueeze(1).log()
    least = torch.maximum(least_k, torch.maximum(least_p, least_min)).squeeze(1)
    return torch.where(greedy, float("-inf"), least)


def token_keys(values: Tensor, tokens: Tensor) -> Tensor:
    """Return a key for each pair of a float32 value and a token id, int64.

    A larger value has a larger key. Of equal values, the lowest token id has the largest key. A NaN
    counts as larger than any number.
    """
    # The upper 32 bits are the value's bits, read as int32. If the value is negative, its lower 31
    # bits are flipped: a larger value gives a larger int32. The lower 32 bits are larger for lower
    # token ids. Adding 0.0 turns -0.0 into 0.0, so that equal values have equal bits. The bits of a
    # NaN without sign, 0x7FC00000, are larger than those of inf.
    bits = torch.where(values.isnan(), float("nan"), values + 0.0).view(torch.int32)
    order = bits ^ (bits >> 31 & 0x7FFFFFFF)
    return (order.long() << 32) | (_MASK32 - tokens)


def key_values(keys: Tensor) -> Tensor:
    """Return the float32 values from which `token_keys` made the keys."""
    order = (keys >> 32).int()
    return (order ^ (order >> 31 & 0x7FFFFFFF)).view(torch.float32)


def key_tokens(keys: Tensor) -> Tensor:
    """Return the token ids from which `token_keys` made the keys, int64."""
    return _MASK32 - (keys & _MASK32)


def top_and_mass(logits: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what `score` needs to know of some rows of `logits`: keys and masses.

    Keys are those of the `count` likeliest tokens of each row, the likeliest first, int64
    [len(rows), count]. A row's mass is the sum of exp(x - highest) over its logits x, in units of
    `UNIT`, int64 [len(rows)]. Integers are added, since their sum has no order.
    """
    if logits.is_cuda and has_triton():
        from layers.kernels import scores

        return scores.top_and_mass(logits, rows, count)
    x = logits.index_select(0, rows).float()
    # All keys differ, so `topk` has no ties to settle.
    keys = token_keys(x, torch.arange(x.shape[1], device=x.device)).topk(count, dim=1).values
    shares = (x - key_values(keys[:, :1])).exp()
    return keys, (shares / UNIT + 0.5).long().sum(dim=1)


def score(
    logits: Tensor,
    tokens: Tensor,
    num_top: int,
    rows: Tensor | None = None,
    *,
    ranked: bool = False,
) -> TokenScores:
    """Return log-probabilities of `tokens`, int64 [R], and of the `num_top` likeliest per row.

    Token i is scored with row `rows[i]` of `logits`, or with row i if `rows` is None. Of equally
    likely tokens the lowest id comes first. A result depends on its row's logits alone: other rows,
    `num_top` and the dtype change no bit.
    """
    at = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
    parts = []
    for start in range(0, max(1, len(tokens)), SCORED_ROWS):
        part = slice(start, start + SCORED_ROWS)
        keys, mass = top_and_mass(logits, at[part], max(1, num_top))
        top, drawn = key_values(keys).double(), logits[at[part], tokens[part]].double()
        total = top[:, 0] + (mass.double() * UNIT).log()
        ranks = top.new_empty(len(top), 0, dtype=torch.int64)
        if ranked:
            larger = logits.index_select(0, at[part]) > drawn.unsqueeze(1)
            # The values fall. So the place of the first equal value is the number of larger ones.
            top_larger = torch.searchsorted(-top, -top)[:, :num_top]
            ranks = torch.cat((larger.sum(1, keepdim=True), top_larger), dim=1) + 1
        parts.append((drawn - total, key_tokens(keys), top - total.unsqueeze(1), ranks))
    values, ids, best, ranks = (torch.cat(part) for part in zip(*parts, strict=True))
    return TokenScores(tokens, values.float(), ids[:, :num_top], best[:, :num_top].float(), ranks)
