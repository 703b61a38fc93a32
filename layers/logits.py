"""Penalties, filters and log-probabilities (scores) for logits [R, V] of the whole vocabulary.

Penalties are applied before filters, as in transformers' `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layers.kernels.launch import has_triton

# Rows that `score` copies at once. For 151,936 bfloat16 logits a row three copies take 194 MB.
SCORED_ROWS = 128


@dataclass(frozen=True, slots=True)
class Filters:
    """Filter settings of R rows, [R] float32 each; `logit_bounds_reference` says what they do."""

    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of R rows, [R] float32 each; `SamplingParams` says what they do."""

    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of given tokens, [R], and of the N likeliest tokens of each row, [R, N]."""

    tokens: Tensor
    values: Tensor
    top_tokens: Tensor
    top_values: Tensor

    def pinned(self) -> TokenScores:
        """Enqueue copies of all tensors to pinned host memory on the current CUDA stream."""

        def copied(x: Tensor) -> Tensor:
            target = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            return target.copy_(x, non_blocking=True)

        return TokenScores(*(copied(getattr(self, name)) for name in self.__slots__))


def penalize(
    logits: Tensor, tokens: Tensor, num_prompt: Tensor, num_tokens: Tensor, by: Penalties
) -> None:
    """Apply penalties for the tokens that each request has so far to the logits [R, V], in place.

    The repetition penalty is that of CTRL (Keskar et al., 2019) and counts prompt and output. The
    presence and frequency penalties are OpenAI's and count the output only.

    Args:
        tokens: integer ids [R, L] of the prompt, then of the output. Later entries are ignored.
        num_prompt, num_tokens: integer lengths [R] of prompt, and of prompt plus output (>= 1).
    """
    if not logits.is_cuda:
        # On a GPU the tensor stays whole, since the host would have to wait for the largest length.
        tokens = tokens[:, : int(num_tokens.max())]
    at = torch.arange(tokens.shape[1], device=tokens.device)
    known = at < num_tokens.unsqueeze(1)
    output = known & (at >= num_prompt.unsqueeze(1))
    # Entries after a row's end become its first token; entries with one token write equal logits.
    ids = torch.where(known, tokens, tokens[:, :1]).long()
    counts = torch.zeros_like(logits).scatter_add_(1, ids, output.float()).gather(1, ids)
    old, repetition = logits.gather(1, ids), by.repetition.unsqueeze(1)
    new = torch.where(old > 0, old / repetition, old * repetition)
    new -= counts * by.frequency.unsqueeze(1)
    new -= (counts > 0) * by.presence.unsqueeze(1)
    logits.scatter_(1, ids, new)


def logit_bounds(logits: Tensor, filters: Filters) -> Tensor:
    """Return the smallest logit of each row whose token may be sampled, [R] float32."""
    if logits.is_cuda and has_triton():
        from layers.kernels import logit_bounds as kernel

        return kernel.logit_bounds(logits, filters)
    return logit_bounds_reference(logits, filters)


def logit_bounds_reference(logits: Tensor, filters: Filters) -> Tensor:
    """Do what `logit_bounds` does, by sorting. Rows with temperature 0 are not filtered.

    top_k keeps the k most likely tokens, or all if k < 1 (Fan et al., 2018). Of these tokens, top_p
    keeps the fewest whose probabilities sum up to p, the most likely first (Holtzman et al., 2020).
    min_p keeps tokens at least min_p times as likely as the likeliest (Nguyen et al., 2024).
    """
    ordered = logits.float().sort(dim=1, descending=True).values
    highest, greedy = ordered[:, :1], filters.temperatures == 0
    # Temperatures are clamped above 0, since 0 / 0 below would be NaN.
    temperature = torch.where(greedy, 1.0, filters.temperatures).clamp(min=1e-30).unsqueeze(1)
    kept = torch.where(filters.top_k < 1, logits.shape[1], filters.top_k).long()
    least_k = ordered.gather(1, (kept.clamp(max=logits.shape[1]) - 1).unsqueeze(1))
    # The largest logit is subtracted first: a tiny temperature would make all logits infinite.
    shifted = torch.where(ordered >= least_k, (ordered - highest) / temperature, float("-inf"))
    probability = shifted.softmax(dim=1)
    # A token stays if the more likely tokens together do not reach p.
    before = probability.cumsum(1) - probability
    inside = (before < filters.top_p.unsqueeze(1)) | (filters.top_p.unsqueeze(1) >= 1)
    last = inside.sum(1, keepdim=True).clamp(min=1) - 1
    least_p = ordered.gather(1, last)
    least_min = highest + temperature * filters.min_p.unsqueeze(1).log()
    least = torch.maximum(least_k, torch.maximum(least_p, least_min)).squeeze(1)
    return torch.where(greedy, float("-inf"), least)


def score(logits: Tensor, tokens: Tensor, num_top: int, rows: Tensor | None = None) -> TokenScores:
    """Score `tokens`, int64 [R], and the `num_top` likeliest, in `rows` (default: first R rows)."""
    parts = []
    for start in range(0, max(1, len(tokens)), SCORED_ROWS):
        part = slice(start, start + SCORED_ROWS)
        taken = logits[part] if rows is None else logits.index_select(0, rows[part])
        found = taken.float().log_softmax(dim=1)
        top = found.topk(num_top, dim=1)
        values = found.gather(1, tokens[part].unsqueeze(1)).squeeze(1)
        parts.append((values, top.indices, top.values))
    values, ids, best = (torch.cat(part) for part in zip(*parts, strict=True))
    return TokenScores(tokens, values, ids, best)
