"""Sampling options besides temperature and seed, for the sampled rows of a step.

In this file a row of a step is one input token. The R sampled rows of a step are the rows whose
next token is drawn. Filters (top-k, top-p, min-p) give each row a lower bound: tokens with logits
below the bound are not drawn. Penalties, `min_tokens` and logits processors change the logits of a
row before its token is drawn. Rows with changed logits are divided into blocks of at most
`BLOCK_ROWS` rows. Their tokens are drawn block by block, after the tokens of all other rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.device_state import Staging
from engine.types import NewRequest, StepPlan, TokenLogprobs
from layers.logits import (
    SCORED_ROWS,
    Filters,
    Penalties,
    TokenScores,
    logit_bounds,
    penalize,
    score,
)
from layers.sampler import Sampler
from layers.step_rows import SampledRows
from sampling_params import LogitsProcessor
from utils.errors import LogitsError, shown
from utils.output_types import Logprob

# Maximum number of rows in a block of rows with changed logits. For 64 rows of 151,936 bfloat16
# logits each, the logits, a float32 copy and the token counts for penalties take 97 MB together.
BLOCK_ROWS = 64


def special_bytes(max_num_seqs: int, vocab_size: int, dtype_bytes: int, num_ranks: int) -> int:
    """Return how many bytes of device memory the sampling options of a step take at most.

    A block of rows needs three copies of its logits, two of them in float32. With several ranks,
    two more copies hold the logits of all rows. Log-probabilities of prompts are not counted.
    """
    copies = 0 if num_ranks == 1 else 2 * max_num_seqs * dtype_bytes
    block = min(max_num_seqs, max(BLOCK_ROWS, SCORED_ROWS)) * (dtype_bytes + 8)
    return (copies + block) * vocab_size


@dataclass(frozen=True, slots=True)
class StepScores:
    """Log-probabilities of tokens of a step, and the rows and chunks to which the tokens belong.

    Attributes:
        found: log-probabilities of new tokens, then of prompt tokens. Each of these tokens comes
            with the log-probabilities of the N likeliest tokens. The request's options set N.
        new: for each new token in `found`: index of its row among the sampled rows, whether its
            request asks for ranks, and N.
        prompts: for each prefill chunk of a request that asks for log-probabilities of its prompt:
            index of the chunk, number of its prompt tokens in `found`, whether the request asks for
            ranks, and N.
        num_chunks: number of all prefill chunks in the step.
    """

    found: TokenScores
    new: list[tuple[int, bool, int]]
    prompts: list[tuple[int, int, bool, int]]
    num_chunks: int

    def logprobs(
        self, num_rows: int
    ) -> tuple[list[list[TokenLogprobs]], list[list[TokenLogprobs]]]:
        """Return `StepResult.logprobs` and `.prompt_logprobs`. `found` must be in host memory."""
        f = self.found
        columns = (f.tokens, f.values, f.top_tokens, f.top_values, f.ranks)
        rows = zip(*(column.tolist() for column in columns), strict=True)

        def entry(ranked: bool, num_top: int) -> TokenLogprobs:
            token, value, ids, values, ranks = next(rows)
            found = {token: value, **dict(zip(ids[:num_top], values[:num_top], strict=True))}
            if not ranked:
                return found
            # The token may be among the likeliest, with the same rank.
            known = {token: ranks[0], **dict(zip(ids, ranks[1:], strict=True))}
            return {one: Logprob(value, known[one]) for one, value in found.items()}

        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(num_rows)]
        for row, ranked, num_top in self.new:
            logprobs[row].append(entry(ranked, num_top))
        prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in range(self.num_chunks)]
        for chunk, count, ranked, num_top in self.prompts:
            prompt_logprobs[chunk] = [entry(ranked, num_top) for _ in range(count)]
        return logprobs, prompt_logprobs


@dataclass(frozen=True, slots=True)
class _ChangedRows:
    """A block of S sampled rows whose logits are changed before their tokens are drawn.

    Attributes:
        rows: index of each row among the R sampled rows of the step, int64 [S].
        filters: whether any row of the block has filters.
        penalizes: whether any row of the block has penalties.
        withheld: W pairs of a row and a token that `min_tokens` forbids, int64 [3, W]: index of the
            row in the block, id of the token, first position at which the row may draw the token.
        processors: index in the block, and processors, of each row that has logits processors.
    """

    rows: Tensor
    filters: bool
    penalizes: bool
    withheld: Tensor | None
    processors: list[tuple[int, tuple[LogitsProcessor, ...]]]

    def draw(
        self,
        sampler: Sampler,
        tokens: Tensor,
        logits: Tensor,
        sampled: SampledRows,
        parameters: Tensor,
    ) -> tuple[Tensor, dict[int, LogitsError]]:
        """Draw S tokens, int64 [S]. `logits`, `sampled`, `parameters` have all R sampled rows.

        Also returns the errors of logits processors, by the index of their row in the block. The
        tokens of these rows are `NO_TOKEN`.
        """
        own = sampled[self.rows]
        *filters, repetition, presence, frequency, num_prompt = parameters[:, self.rows]
        changed = logits.index_select(0, self.rows).float()
        errors: dict[int, LogitsError] = {}
        if self.penalizes:
            penalties = Penalties(repetition, presence, frequency)
            known = tokens.index_select(0, own.slots)
            penalize(changed, known, num_prompt, own.positions, penalties)
        if self.withheld is not None:
            row, token, first = self.withheld
            free = own.positions[row] >= first
            changed[row, token] = torch.where(free, changed[row, token], float("-inf"))
        for i, calls in self.processors:
            ids = tokens[own.slots[i], : own.positions[i]].tolist()
            if error := _process(calls, ids, changed, i):
                errors[i] = error
        least = logit_bounds(changed, Filters(*filters)) if self.filters else None
        return sampler.whole(changed, own, least=least), errors


@dataclass(frozen=True, slots=True)
class SpecialRows:
    """Sampling options of the R sampled rows of a step.

    Attributes:
        parameters: temperature, 3 filters, 3 penalties, prompt length of each row, float32 [8, R].
        filters: temperature and filters of the R rows, or None if no row outside `changed` has
            filters. Temperature 0 in `filters` means that the row is not filtered. This is so for
            rows without filters, and for rows in `changed`, which are filtered later.
        changed: blocks of the rows whose logits are changed before their tokens are drawn.
        all_changed: whether every sampled row is in a block of `changed`.
        new, prompts, num_chunks: values for the fields of `StepScores` with these names.
        scored_rows: the row index in each entry of `new`, int64 [len(new)].
        prompt_rows: indices in the step, int64 [P], of rows whose logits give the log-probability
            of the next prompt token.
        prompt_tokens: the prompt token that follows each row in `prompt_rows`, int64 [P].
    """

    parameters: Tensor
    filters: Filters | None
    changed: list[_ChangedRows]
    all_changed: bool
    new: list[tuple[int, bool, int]]
    prompts: list[tuple[int, int, bool, int]]
    num_chunks: int
    scored_rows: Tensor
    prompt_rows: Tensor
    prompt_tokens: Tensor

    def draw(
        self, sampler: Sampler, tokens: Tensor, logits: Tensor, sampled: SampledRows
    ) -> tuple[Tensor, StepScores | None, dict[int, LogitsError]]:
        """Draw the step's tokens. Returns the values for the fields of `StepOutput`.

        Args:
            tokens: [slots + 1, max_model_len]: prompt and output tokens of each running request.
            logits: [R + P, this rank's vocabulary], of the R sampled rows, then of `prompt_rows`.
        """
        count = len(sampled.slots)
        whole = sampler.gathered(logits)
        if self.all_changed:
            drawn = torch.empty(count, dtype=torch.int64, device=whole.device)
        else:
            least = logit_bounds(whole[:count], self.filters) if self.filters else None
            drawn = sampler(logits[:count], sampled, least=least)
        errors: dict[int, LogitsError] = {}
        for part in self.changed:
            anew, failed = part.draw(sampler, tokens, whole[:count], sampled, self.parameters)
            drawn.index_copy_(0, part.rows, anew)
            errors |= {int(part.rows[i]): error for i, error in failed.items()}
        return drawn, self._scored(whole[:count], drawn.clamp(min=0), whole[count:]), errors

    def _scored(self, logits: Tensor, tokens: Tensor, prompt_logits: Tensor) -> StepScores | None:
        """Return log-probabilities from the unchanged logits; None if no request asks for any."""
        if not self.new and not self.prompts:
            return None
        num_top = max(n for *_, n in (*self.new, *self.prompts))
        ranked = any(asks for *_, asks, _ in (*self.new, *self.prompts))
        own, rows = tokens[self.scored_rows], self.scored_rows
        new = score(logits, own, num_top, rows, ranked=ranked)
        prompt = score(prompt_logits, self.prompt_tokens, num_top, ranked=ranked)
        both = [torch.cat((getattr(new, f.name), getattr(prompt, f.name))) for f in fields(new)]
        return StepScores(TokenScores(*both), self.new, self.prompts, self.num_chunks)


class SamplingRows:
    """Makes the `SpecialRows` of each plan.

    Args:
        requests: requests with sampling options besides temperature and seed; the keys are slots.
        staging: copies arrays to the device. Call `of` within `staging.group()`.
    """

    def __init__(
        self, requests: Mapping[int, NewRequest], num_slots: int, staging: Staging
    ) -> None:
        self._staging = staging
        self._requests = requests
        self._parameters = np.zeros((num_slots, 8), dtype=np.float32)
        self._decode: tuple[int, ...] | None = None
        self._decode_rows: SpecialRows | None = None

    def of(self, plan: StepPlan) -> SpecialRows | None:
        """Return the sampling options of a plan's sampled rows, or None if no row has any.

        `of` stores new requests' options, so call it for every plan while `requests` has entries.
        """
        for new in plan.new_requests:
            self._parameters[new.slot] = _parameters(new)
        if plan.prefill or plan.new_requests:
            self._decode = None
            return self._found(plan)
        if plan.decode != self._decode:
            self._decode, self._decode_rows = plan.decode, self._found(plan)
        return self._decode_rows

    def _found(self, plan: StepPlan) -> SpecialRows | None:
        slots, known = plan.sampled_slots, self._requests
        special = [(row, known[slot]) for row, slot in enumerate(slots) if slot in known]
        prompts, prompt_rows, prompt_tokens = self._of_prompts(plan)
        if not special and not prompts:
            return None
        changed = [(row, new) for row, new in special if _changes(new)]
        filtered = [row for row, new in special if new.sampling.filters and not _changes(new)]
        asked = [(row, new.sampling) for row, new in special]
        scored = [(r, s.logprobs_details, s.logprobs) for r, s in asked if s.logprobs is not None]
        parameters = np.ascontiguousarray(self._parameters[slots].T)
        # Only rows in `filtered` get filters. Temperature 0 turns filtering off for all other rows.
        filters = np.zeros_like(parameters[:4])
        filters[:, filtered] = parameters[:4, filtered]
        return SpecialRows(
            parameters=self._staging.upload(parameters),
            filters=Filters(*self._staging.upload(filters)) if filtered else None,
            changed=[
                self._changed(changed[first : first + BLOCK_ROWS])
                for first in range(0, len(changed), BLOCK_ROWS)
            ],
            all_changed=len(changed) == len(slots),
            new=scored,
            prompts=prompts,
            num_chunks=len(plan.prefill),
            scored_rows=self._int64([row for row, *_ in scored]),
            prompt_rows=self._int64(prompt_rows),
            prompt_tokens=self._int64(prompt_tokens),
        )

    def _of_prompts(
        self, plan: StepPlan
    ) -> tuple[list[tuple[int, int, bool, int]], list[int], list[int]]:
        prompts: list[tuple[int, int, bool, int]] = []
        rows: list[int] = []
        tokens: list[int] = []
        row = 0
        for i, chunk in enumerate(plan.prefill):
            new = self._requests.get(chunk.slot)
            if new is not None and new.sampling.prompt_logprobs is not None:
                last = len(new.token_ids) - new.num_output_tokens - 1
                count = max(0, min(chunk.num_tokens, last - chunk.start))
                ranked, num_top = new.sampling.logprobs_details, new.sampling.prompt_logprobs
                prompts.append((i, count, ranked, num_top))
                rows += range(row, row + count)
                tokens += new.token_ids[chunk.start + 1 : chunk.start + 1 + count]
            row += chunk.num_tokens
        return (prompts, rows, tokens) if rows else ([], [], [])

    def _changed(self, rows: list[tuple[int, NewRequest]]) -> _ChangedRows:
        options = [new.sampling for _, new in rows]
        withheld = [
            (i, token, len(q.token_ids) - q.num_output_tokens + q.sampling.min_tokens)
            for i, (_, q) in enumerate(rows)
            for token in q.withheld_token_ids
        ]
        calls = [(i, tuple(s.logits_processors)) for i, s in enumerate(options)]
        return _ChangedRows(
            rows=self._int64([row for row, _ in rows]),
            filters=any(s.filters for s in options),
            penalizes=any(s.penalizes for s in options),
            withheld=self._int64(list(zip(*withheld, strict=True))) if withheld else None,
            processors=[(i, some) for i, some in calls if some],
        )

    def _int64(self, values: Any) -> Tensor:
        return self._staging.upload(np.array(values, dtype=np.int64))


def _changes(new: NewRequest) -> bool:
    """Return whether penalties, `min_tokens` or logits processors change the request's logits."""
    s = new.sampling
    return bool(s.penalizes or new.withheld_token_ids or s.logits_processors)


def _parameters(new: NewRequest) -> tuple[float, ...]:
    """Return a request's temperature, top_k, top_p, min_p, its 3 penalties and prompt length."""
    s = new.sampling
    num_prompt = len(new.token_ids) - new.num_output_tokens
    # The caller stores the values as float32, which is exact for integers up to 2^24. A tiny top_p
    # would become 0 in float32, and 0 is not a valid top_p.
    filters = (s.temperature, min(s.top_k, 1 << 24), max(s.top_p, 1e-30), s.min_p)
    return *filters, s.repetition_penalty, s.presence_penalty, s.frequency_penalty, num_prompt


def _process(
    calls: tuple[LogitsProcessor, ...], token_ids: list[int], logits: Tensor, row: int
) -> LogitsError | None:
    """Let logits processors change a row of `logits`, float32 [rows, vocabulary].

    `token_ids` are the prompt and output tokens of the row's request. If a processor fails, the row
    is filled with NaN, and the error is returned.
    """
    shape = logits[row].shape
    try:
        for call in calls:
            # A copy begins at an aligned address. What torch computes from a tensor may depend on
            # the alignment, which in the block would depend on the row's place.
            out = call(list(token_ids), logits[row].clone())
            if not isinstance(out, Tensor) or out.shape != shape or out.is_complex():
                raise TypeError(f"it must return a real tensor of shape {tuple(shape)}")
            logits[row].copy_(out)  # fails for a tensor that is sparse or has no data
    except (Exception, SystemExit) as error:  # SystemExit would end the process of a rank
        logits[row] = float("nan")
        failed = LogitsError(f"logits processor {shown(call)} failed: {shown(error)}")
        failed.__cause__ = error
        return failed
    return None
