"""Sampling options of a step's rows: filters, penalties, log-probabilities, logits processors.

Most steps have no request with such an option and pay for one look at an empty dictionary. The
others run the same forward pass. Filters are a bound on the logits to draw from, for every row of
the step. Rows that are drawn from other logits than the model's are drawn apart, some at a time.
"""

from __future__ import annotations

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
from utils.errors import StepError

# Rows whose logits are changed at once. Each takes its logits, a float32 copy and the penalties'
# counts: 97 MB for 64 rows of 151,936 bfloat16 logits, whatever the batch.
BLOCK_ROWS = 64


def special_bytes(max_num_seqs: int, vocab_size: int, dtype_bytes: int, num_ranks: int) -> int:
    """Most device memory in bytes that rows with options take beyond a plain step.

    That is the larger of the blocks of rows, to be changed or scored: a copy and two of float32
    for each. Ranks also gather whole rows of logits and add them up.
    """
    copies = 0 if num_ranks == 1 else 2 * max_num_seqs * dtype_bytes
    block = min(max_num_seqs, max(BLOCK_ROWS, SCORED_ROWS)) * (dtype_bytes + 8)
    return (copies + block) * vocab_size


@dataclass(frozen=True, slots=True)
class StepScores:
    """Log-probabilities of a step, and whose they are.

    Attributes:
        found: of new tokens, then of prompts.
        new: (row of the step's new tokens, most likely ones wanted) for each of the former.
        prompts: (prefill chunk, number of its tokens, most likely ones wanted) in order.
        num_chunks: prefill chunks of the step.
    """

    found: TokenScores
    new: list[tuple[int, int]]
    prompts: list[tuple[int, int, int]]
    num_chunks: int

    def logprobs(
        self, num_rows: int
    ) -> tuple[list[list[TokenLogprobs]], list[list[TokenLogprobs]]]:
        """Those of new tokens and of prompts, as in `StepResult`; `found` is on the host.

        Args:
            num_rows: rows of new tokens.
        """
        f = self.found
        columns = (f.tokens, f.values, f.top_tokens, f.top_values)
        rows = zip(*(column.tolist() for column in columns), strict=True)

        def entry(num_top: int) -> TokenLogprobs:
            token, value, ids, values = next(rows)
            return {token: value, **dict(zip(ids[:num_top], values[:num_top], strict=True))}

        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(num_rows)]
        for row, num_top in self.new:
            logprobs[row].append(entry(num_top))
        prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in range(self.num_chunks)]
        for chunk, count, num_top in self.prompts:
            prompt_logprobs[chunk] = [entry(num_top) for _ in range(count)]
        return logprobs, prompt_logprobs


@dataclass(frozen=True, slots=True)
class _ChangedRows:
    """Up to `BLOCK_ROWS` of a step's rows, S, that are drawn from other logits than the model's.

    Attributes:
        rows: [S] int64 places among the R sampled rows.
        filters, penalizes: whether any of them has filters, or penalties.
        withheld: [3, W] int64: row of the S, token, position from which it may be chosen.
        processors: (row of the S, what to call) of those that have any.
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
    ) -> Tensor:
        """[S] int64 tokens; `logits`, whole rows, `sampled` and `parameters` are those of all R."""
        own = sampled[self.rows]
        *filters, repetition, presence, frequency, num_prompt = parameters[:, self.rows]
        changed = logits.index_select(0, self.rows).float()
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
            for call in calls:
                changed[i] = _processed(call, ids, changed[i])
        least = logit_bounds(changed, Filters(*filters)) if self.filters else None
        return sampler.whole(changed, own, least=least)


@dataclass(frozen=True, slots=True)
class SpecialRows:
    """The options of one step's R sampled rows, of which some have any.

    Attributes:
        parameters: [8, R] float32, see `_parameters`.
        filters: of all R, neutral where they do not apply; None if there are none.
        changed: the rows that are drawn from other logits, in blocks.
        all_changed: there are no others.
        new, prompts, num_chunks: as in `StepScores`.
        scored_rows: [len(new)] int64 places among the R.
        prompt_rows, prompt_tokens: [P] int64 rows of the step, and the tokens that follow them.
    """

    parameters: Tensor
    filters: Filters | None
    changed: list[_ChangedRows]
    all_changed: bool
    new: list[tuple[int, int]]
    prompts: list[tuple[int, int, int]]
    num_chunks: int
    scored_rows: Tensor
    prompt_rows: Tensor
    prompt_tokens: Tensor

    def draw(
        self, sampler: Sampler, tokens: Tensor, logits: Tensor, sampled: SampledRows
    ) -> tuple[Tensor, StepScores | None]:
        """Draw the step's tokens.

        Args:
            tokens: [slots, max_model_len] token ids of each slot so far.
            logits: [R, this rank's columns], then those of `prompt_rows`.

        Returns:
            [R] int64 tokens, and the log-probabilities that were asked for.
        """
        count = len(sampled.slots)
        whole = sampler.gathered(logits)
        if self.all_changed:
            drawn = torch.empty(count, dtype=torch.int64, device=whole.device)
        else:
            least = logit_bounds(whole[:count], self.filters) if self.filters else None
            drawn = sampler(logits[:count], sampled, least=least)
        for part in self.changed:
            anew = part.draw(sampler, tokens, whole[:count], sampled, self.parameters)
            drawn.index_copy_(0, part.rows, anew)
        return drawn, self._scored(whole[:count], drawn, whole[count:])

    def _scored(self, logits: Tensor, tokens: Tensor, prompt_logits: Tensor) -> StepScores | None:
        """Log-probabilities by [R, V] logits as the model made them."""
        if not self.new and not self.prompts:
            return None
        num_top = max(n for *_, n in (*self.new, *self.prompts))
        new = score(logits, tokens[self.scored_rows], num_top, self.scored_rows)
        prompt = score(prompt_logits, self.prompt_tokens, num_top)
        both = [torch.cat((getattr(new, f.name), getattr(prompt, f.name))) for f in fields(new)]
        return StepScores(TokenScores(*both), self.new, self.prompts, self.num_chunks)


class SamplingRows:
    """Which slots' requests have sampling options beyond temperature and seed.

    Args:
        num_slots: rows of the runner's per-slot tables, without padding.
        staging: uploads what rows need; a group of uploads has to have begun.
    """

    def __init__(self, num_slots: int, staging: Staging) -> None:
        self._staging = staging
        self._requests: dict[int, NewRequest] = {}
        self._parameters = np.zeros((num_slots, 8), dtype=np.float32)
        self._decode: tuple[int, ...] | None = None
        self._decode_rows: SpecialRows | None = None

    def of(self, plan: StepPlan) -> SpecialRows | None:
        """The options of the plan's rows, None if there are none; to be called for every plan."""
        for new in plan.new_requests:
            if new.sampling.needs_logits:
                self._requests[new.slot] = new
                self._parameters[new.slot] = _parameters(new)
            else:
                self._requests.pop(new.slot, None)
        if not self._requests:
            return None
        if plan.prefill or plan.new_requests:
            self._decode = None
            return self._found(plan)
        if plan.decode != self._decode:
            # Most steps decode the same requests as the one before.
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
        scored = [(r, q.sampling.logprobs) for r, q in special if q.sampling.logprobs is not None]
        parameters = np.ascontiguousarray(self._parameters[slots].T)
        # With temperature 0, and so without filters, where they do not apply.
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
            scored_rows=self._int64([row for row, _ in scored]),
            prompt_rows=self._int64(prompt_rows),
            prompt_tokens=self._int64(prompt_tokens),
        )

    def _of_prompts(
        self, plan: StepPlan
    ) -> tuple[list[tuple[int, int, int]], list[int], list[int]]:
        """As in `SpecialRows`: prompts, rows and following tokens whose scores are wanted."""
        prompts: list[tuple[int, int, int]] = []
        rows: list[int] = []
        tokens: list[int] = []
        row = 0
        for i, chunk in enumerate(plan.prefill):
            new = self._requests.get(chunk.slot)
            if new is not None and new.sampling.prompt_logprobs is not None:
                last = len(new.token_ids) - new.num_output_tokens - 1
                count = max(0, min(chunk.num_tokens, last - chunk.start))
                prompts.append((i, count, new.sampling.prompt_logprobs))
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
    """Whether a request's tokens are drawn from other logits than the model's."""
    s = new.sampling
    return bool(s.penalizes or new.withheld_token_ids or s.logits_processors)


def _parameters(new: NewRequest) -> tuple[float, ...]:
    """Filters (temperature, top_k, top_p, min_p), penalties and prompt length of a request.

    float32 holds integers up to 2^24 exactly.
    """
    s = new.sampling
    num_prompt = len(new.token_ids) - new.num_output_tokens
    # A top_p that float32 took for 0 would be reached by nothing.
    filters = (s.temperature, min(s.top_k, 1 << 24), max(s.top_p, 1e-30), s.min_p)
    return *filters, s.repetition_penalty, s.presence_penalty, s.frequency_penalty, num_prompt


def _processed(call: LogitsProcessor, token_ids: list[int], logits: Tensor) -> Tensor:
    try:
        out = call(token_ids, logits)
    except Exception as error:
        raise StepError(f"logits processor {call!r} failed: {error!r}") from error
    if not isinstance(out, Tensor) or out.shape != logits.shape:
        raise TypeError(
            f"logits processor {call!r} must return a tensor of shape {tuple(logits.shape)}"
        )
    return out
