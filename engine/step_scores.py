"""Log-probabilities (scores) of the new tokens of a step, and of prompt tokens.

For each of its tokens a request asks for the log-probabilities of the token and of the N likeliest
tokens, and maybe for ranks. Rows are scored in groups of rows with similar N, so that a request
with a large N costs nothing for rows of other groups. A `Group` has the smallest power of 4 that is
at least N, and says whether its rows want ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from engine.types import TokenLogprobs
from layers.logits import TokenScores, score
from layers.sampler import Sampler
from utils.output_types import Logprob

# Maximum number of prompt rows whose logits exist at once (a block). 256 rows of 151,936 bfloat16
# logits take 78 MB. For each block the head reads all its weights, and computes 2 flops for each
# weight and row. With 128 rows that is 128 flops for each byte of bfloat16 weights. An H200 can do
# about 180 flops in the time in which it reads a byte, so it would wait for the weights.
PROMPT_ROWS = 256


Group = tuple[int, bool]


def group_of(num_top: int, *, ranked: bool) -> Group:
    """Return the group of rows that want the `num_top` likeliest tokens, and maybe ranks."""
    most = 1
    while most < num_top:
        most *= 4
    return most, ranked


@dataclass(frozen=True, slots=True)
class StepScores:
    """Log-probabilities of tokens of a step, and the rows and chunks to which the tokens belong.

    Attributes:
        found: for each group the log-probabilities of its new tokens, then of its prompt tokens.
        new: for each new token the index of its row among the sampled rows, whether its request
            wants ranks, and N.
        prompts: for each prefill chunk with scored prompt tokens the index of the chunk, the number
            of these tokens, whether the request wants ranks, and N.
        num_chunks: number of all prefill chunks in the step.
    """

    found: dict[Group, TokenScores]
    new: list[tuple[int, bool, int]]
    prompts: list[tuple[int, int, bool, int]]
    num_chunks: int

    def pinned(self) -> StepScores:
        """Return copies in pinned host memory. The host does not wait for them."""
        return replace(self, found={group: one.pinned() for group, one in self.found.items()})

    def logprobs(
        self, num_rows: int
    ) -> tuple[list[list[TokenLogprobs]], list[list[TokenLogprobs]]]:
        """Return `StepResult.logprobs` and `.prompt_logprobs`. `found` must be in host memory."""
        rows = {group: _rows(found) for group, found in self.found.items()}

        def entry(ranked: bool, num_top: int) -> TokenLogprobs:
            token, value, ids, values, ranks = next(rows[group_of(num_top, ranked=ranked)])
            found = {token: value, **dict(zip(ids[:num_top], values[:num_top], strict=True))}
            if not ranked:
                return found
            # If the token is among the likeliest ones, both of its entries have the same rank.
            known = {token: ranks[0], **dict(zip(ids, ranks[1:], strict=True))}
            return {one: Logprob(value, known[one]) for one, value in found.items()}

        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(num_rows)]
        for row, ranked, num_top in self.new:
            logprobs[row].append(entry(ranked, num_top))
        prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in range(self.num_chunks)]
        for chunk, count, ranked, num_top in self.prompts:
            prompt_logprobs[chunk] = [entry(ranked, num_top) for _ in range(count)]
        return logprobs, prompt_logprobs


def _rows(found: TokenScores) -> Iterator[tuple[int, float, list[int], list[float], list[int]]]:
    columns = found.tokens, found.values, found.top_tokens, found.top_values, found.ranks
    return zip(*(column.tolist() for column in columns), strict=True)


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """The rows of a step whose tokens are scored.

    Attributes:
        new, prompts, num_chunks: values for the fields of `StepScores` with these names.
        new_rows: for each group the row indices of its entries in `new`, int64.
        prompt_rows: indices in the step, int64 [P], of rows whose logits give the log-probability
            of the next prompt token, one group after another.
        prompt_tokens: the prompt token that follows each row in `prompt_rows`, int64 [P].
        prompt_counts: for each group the number of its rows in `prompt_rows`.
    """

    new: list[tuple[int, bool, int]]
    prompts: list[tuple[int, int, bool, int]]
    num_chunks: int
    new_rows: dict[Group, Tensor]
    prompt_rows: Tensor
    prompt_tokens: Tensor
    prompt_counts: dict[Group, int]

    def score(
        self,
        sampler: Sampler,
        logits: Tensor,
        tokens: Tensor,
        head: Callable[[Tensor], Tensor],
        states: Tensor,
    ) -> StepScores:
        """Return the scores of new `tokens`, int64 [R], and of prompt tokens.

        `logits` are those of all R sampled rows and the whole vocabulary. `head` computes the
        logits of prompt rows from their `states`, [P, hidden_size], block by block.
        """
        found: dict[Group, list[TokenScores]] = {}
        num_top: dict[Group, int] = {}
        for *_, ranked, count in (*self.new, *self.prompts):
            group = group_of(count, ranked=bool(ranked))
            num_top[group] = max(num_top.get(group, 0), count)
        for group, rows in self.new_rows.items():
            scores = score(logits, tokens[rows], num_top[group], rows, ranked=group[1])
            found[group] = [scores]
        start = 0
        for group, count in self.prompt_counts.items():
            end = start + count
            for first in range(start, end, PROMPT_ROWS):
                part = slice(first, min(first + PROMPT_ROWS, end))
                whole = sampler.gathered(head(states[part]))
                own = self.prompt_tokens[part]
                scores = score(whole, own, num_top[group], ranked=group[1])
                found.setdefault(group, []).append(scores)
            start = end
        joined = {group: _joined(parts) for group, parts in found.items()}
        return StepScores(joined, self.new, self.prompts, self.num_chunks)


def _joined(parts: list[TokenScores]) -> TokenScores:
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(TokenScores)]
    return TokenScores(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
