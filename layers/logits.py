"""Penalties, filters and log-probabilities of whole rows of logits [R, V].

Penalties come before filters, as in transformers' `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layers.kernels.launch import has_triton

# Rows scored at once; for 151,936 bfloat16 logits their three copies take 194 MB.
SCORED_ROWS = 128


@dataclass(frozen=True, slots=True)
class Filters:
    """Which tokens may be drawn, [R] float32 each; see `logit_bounds_reference`."""

    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """A penalty of each kind for each of R rows, [R] float32; see `SamplingParams`."""

    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of tokens [R], and of the most likely ones in their places [R, N]."""

    tokens: Tensor
    values: Tensor
    top_tokens: Tensor
    top_values: Tensor

    def pinned(self) -> TokenScores:
        """Copies in pinned memory, enqueued on the current CUDA stream."""

        def copied(x: Tensor) -> Tensor:
            target = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            return target.copy_(x, non_blocking=True)

        return TokenScores(*(copied(getattr(self, name)) for name in self.__slots__))


def penalize(
    logits: Tensor, tokens: Tensor, num_prompt: Tensor, num_tokens: Tensor, by: Penalties
) -> None:
    """Apply the penalties of the tokens so far to the logits, in place.

    The repetition penalty is that of CTRL (Keskar et al., 2019), over prompt and output; presence
    and frequency penalties are OpenAI's, over the output alone.

    Args:
        tokens: [R, L] integer token ids: prompt, output, then anything.
        num_prompt, num_tokens: [R] integer lengths, of prompt and of both, at least 1.
    """
    if not logits.is_cuda:
        # On a GPU the host would have to wait for the length.
        tokens = tokens[:, : int(num_tokens.max())]
    at = torch.arange(tokens.shape[1], device=tokens.device)
    known = at < num_tokens.unsqueeze(1)
    output = known & (at >= num_prompt.unsqueeze(1))
    # Beyond the end the first token again: all places of a token write the same logit.
    ids = torch.where(known, tokens, tokens[:, :1]).long()
    counts = torch.zeros_like(logits).scatter_add_(1, ids, output.float()).gather(1, ids)
    old, repetition = logits.gather(1, ids), by.repetition.unsqueeze(1)
    new = torch.where(old > 0, old / repetition, old * repetition)
    new -= counts * by.frequency.unsqueeze(1)
    new -= (counts > 0) * by.presence.unsqueeze(1)
    logits.scatter_(1, ids, new)


def logit_bounds(logits: Tensor, filters: Filters) -> Tensor:
    """[R] float32: the least logit of each row whose token may be drawn."""
    if logits.is_cuda and has_triton():
        from layers.kernels import logit_bounds as kernel

        return kernel.logit_bounds(logits, filters)
    return logit_bounds_reference(logits, filters)


def logit_bounds_reference(logits: Tensor, filters: Filters) -> Tensor:
    """As `logit_bounds`, by sorting. Temperatures of 0 filter nothing, nor does a top_k below 1.

    top_k keeps the k most likely tokens (Fan et al., 2018); top_p of these the fewest that reach
    the probability p (Holtzman et al., 2020); min_p those at least min_p times as likely as the
    most likely one (Nguyen et al., 2024).
    """
    ordered = logits.float().sort(dim=1, descending=True).values
    highest, greedy = ordered[:, :1], filters.temperatures == 0
    # Above 0, so that no 0 / 0 comes of it.
    temperature = torch.where(greedy, 1.0, filters.temperatures).clamp(min=1e-30).unsqueeze(1)
    kept = torch.where(filters.top_k < 1, logits.shape[1], filters.top_k).long()
    least_k = ordered.gather(1, (kept.clamp(max=logits.shape[1]) - 1).unsqueeze(1))
    # The largest is subtracted first: a tiny temperature must not make infinities of all.
    shifted = torch.where(ordered >= least_k, (ordered - highest) / temperature, float("-inf"))
    probability = shifted.softmax(dim=1)
    # A token stays if those before it do not reach p.
    before = probability.cumsum(1) - probability
    inside = (before < filters.top_p.unsqueeze(1)) | (filters.top_p.unsqueeze(1) >= 1)
    last = inside.sum(1, keepdim=True).clamp(min=1) - 1
    least_p = ordered.gather(1, last)
    least_min = highest + temperature * filters.min_p.unsqueeze(1).log()
    least = torch.maximum(least_k, torch.maximum(least_p, least_min)).squeeze(1)
    return torch.where(greedy, float("-inf"), least)


def score(logits: Tensor, tokens: Tensor, num_top: int, rows: Tensor | None = None) -> TokenScores:
    """Scores of `tokens` [R] int64 and the `num_top` best in the first R rows, or in `rows` [R]."""
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
