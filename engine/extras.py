"""What a step's requests ask beyond temperature and seed, and the rows that it concerns.

Most steps have no such request and pay for one look at an empty dictionary. The others run the
same forward pass; their special rows are then drawn from changed logits, the plain ones as ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batch import SlotTables
from engine.staging import Staging
from engine.types import NewRequest, StepPlan, StepResult, TokenLogprobs
from layers.logits import Filters, Penalties, TokenScores, keep, penalize, score
from layers.sampler import Sampler
from sampling_params import LogitsProcessor


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of a step, and whose they are.

    Attributes:
        scores: of new tokens, then of prompts.
        new: (row of the step's new tokens, most likely ones wanted) for each of the former.
        prompts: (prefill chunk, number of its tokens, most likely ones wanted) in order.
        num_chunks: prefill chunks of the step.
    """

    scores: TokenScores
    new: list[tuple[int, int]]
    prompts: list[tuple[int, int, int]]
    num_chunks: int

    def result(self, step_id: int, tokens: list[list[int]]) -> StepResult:
        """The step's result, once the scores are on the host."""
        s = self.scores
        columns = (s.tokens, s.values, s.top_tokens, s.top_values)
        rows = zip(*(column.tolist() for column in columns), strict=True)

        def entry(num_top: int) -> TokenLogprobs:
            token, value, ids, values = next(rows)
            return {token: value, **dict(zip(ids[:num_top], values[:num_top], strict=True))}

        logprobs: list[list[TokenLogprobs]] = [[] for _ in tokens]
        for row, num_top in self.new:
            logprobs[row].append(entry(num_top))
        prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in range(self.num_chunks)]
        for chunk, count, num_top in self.prompts:
            prompt_logprobs[chunk] = [entry(num_top) for _ in range(count)]
        return StepResult(step_id, tokens, logprobs, prompt_logprobs)


@dataclass(frozen=True, slots=True)
class StepExtras:
    """One step's special rows: S of its R new tokens are drawn from changed logits.

    Attributes:
        rows: [S] int64 places among the R.
        all_rows: S is R.
        filters: None if there are none, as the following ones.
        penalties: None if there are none.
        num_prompt: [S] prompt lengths.
        withheld: [3, W] int64: row of the S, token, position from which it may be chosen.
        processors: (row of the S, what to call) of those that have any.
        new, prompts: as in `Scored`.
        scored_rows: [len(new)] int64 places among the R.
        prompt_rows, prompt_tokens: [P] int64 rows of the step's T tokens, and those that follow.
    """

    rows: Tensor
    all_rows: bool
    filters: Filters | None
    penalties: Penalties | None
    num_prompt: Tensor
    withheld: Tensor | None
    processors: list[tuple[int, tuple[LogitsProcessor, ...]]]
    new: list[tuple[int, int]]
    prompts: list[tuple[int, int, int]]
    num_chunks: int
    scored_rows: Tensor
    prompt_rows: Tensor
    prompt_tokens: Tensor

    def draw(
        self, sampler: Sampler, tables: SlotTables, logits: Tensor, slots: Tensor, positions: Tensor
    ) -> tuple[Tensor, Scored | None]:
        """Draw the step's tokens.

        Args:
            logits: [R + P, this rank's columns]: the rows to draw from, then `prompt_rows`.
            slots, positions: [R] of the new tokens.

        Returns:
            [R] int64 tokens, and the log-probabilities that were asked for.
        """
        count, rows = len(slots), self.rows
        whole = sampler.gathered(logits)
        keys = tables.temperatures[slots], tables.seeds[slots], positions
        changed = self._changed(whole[:count], tables.tokens, slots[rows], positions[rows])
        drawn = sampler.whole(changed, *(key[rows] for key in keys))
        if not self.all_rows:
            drawn = sampler(logits[:count], *keys).index_copy_(0, rows, drawn)
        return drawn, self._scored(whole[:count], drawn, whole[count:])

    def _changed(self, logits: Tensor, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """The special rows' logits [S, V] to draw from, of [R, V] that stay as they are."""
        if not self.all_rows:
            logits = logits.index_select(0, self.rows)
        if self.penalties or self.withheld is not None or self.processors:
            logits = logits.to(torch.float32, copy=True)
        if self.penalties:
            known = tokens.index_select(0, slots)
            logits = penalize(logits, known, self.num_prompt, positions, self.penalties)
        if self.withheld is not None:
            row, token, first = self.withheld
            free = positions[row] >= first
            logits[row, token] = torch.where(free, logits[row, token], float("-inf"))
        for i, calls in self.processors:
            ids = tokens[slots[i], : positions[i]].tolist()
            for call in calls:
                logits[i] = _processed(call, ids, logits[i])
        return keep(logits, self.filters) if self.filters else logits

    def _scored(self, logits: Tensor, tokens: Tensor, prompt_logits: Tensor) -> Scored | None:
        """Log-probabilities by [R, V] logits as the model made them."""
        if not self.new and not self.prompts:
            return None
        num_top = max(n for *_, n in (*self.new, *self.prompts))
        new = score(logits[self.scored_rows], tokens[self.scored_rows], num_top)
        prompt = score(prompt_logits, self.prompt_tokens, num_top)
        names = TokenScores.__slots__
        both = TokenScores(*(torch.cat((getattr(new, n), getattr(prompt, n))) for n in names))
        return Scored(both, self.new, self.prompts, self.num_chunks)


class Extras:
    """Which slots' requests are special, and how.

    Args:
        num_slots: rows of the runner's per-slot tables, without padding.
        device: of the logits.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        # Buffers of its own: those of the tables take turns once a step.
        self._staging = Staging(device, 1 << 16)
        self._requests: dict[int, NewRequest] = {}
        self._parameters = np.zeros((num_slots, 8), dtype=np.float32)
        self._decode: tuple[int, ...] | None = None
        self._decode_extras: StepExtras | None = None

    def of(self, plan: StepPlan) -> StepExtras | None:
        """What the plan's rows ask for, None if nothing; to be called for every plan."""
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
            self._decode, self._decode_extras = plan.decode, self._found(plan)
        return self._decode_extras

    def _found(self, plan: StepPlan) -> StepExtras | None:
        requests, slots = self._requests, plan.sampled_slots
        special = [(row, requests[slot]) for row, slot in enumerate(slots) if slot in requests]
        chunks = self._prompt_chunks(plan)
        if not special and not chunks:
            return None
        return self._staged(plan, special, chunks, len(slots))

    def _prompt_chunks(self, plan: StepPlan) -> list[tuple[int, int, int]]:
        """(chunk, tokens whose log-probabilities it gives, its first row) of those wanted."""
        found, row = [], 0
        for i, chunk in enumerate(plan.prefill):
            new = self._requests.get(chunk.slot)
            if new is not None and new.sampling.prompt_logprobs is not None:
                last = len(new.token_ids) - new.num_output_tokens - 1
                count = min(chunk.num_tokens, last - chunk.start)
                if count > 0:
                    found.append((i, count, row))
            row += chunk.num_tokens
        return found

    def _staged(
        self,
        plan: StepPlan,
        special: list[tuple[int, NewRequest]],
        chunks: list[tuple[int, int, int]],
        num_sampled: int,
    ) -> StepExtras:
        changed = [(row, new) for row, new in special if _changes(new)]
        new = [(r, q.sampling.logprobs) for r, q in special if q.sampling.logprobs is not None]
        withheld = [
            (i, token, len(q.token_ids) - q.num_output_tokens + q.sampling.min_tokens)
            for i, (_, q) in enumerate(changed)
            for token in q.stop_token_ids
        ]
        prompts: list[tuple[int, int, int]] = []
        prompt_rows: list[int] = []
        prompt_tokens: list[int] = []
        for i, count, row in chunks:
            chunk = plan.prefill[i]
            request = self._requests[chunk.slot]
            assert request.sampling.prompt_logprobs is not None
            prompts.append((i, count, request.sampling.prompt_logprobs))
            prompt_rows += range(row, row + count)
            prompt_tokens += request.token_ids[chunk.start + 1 : chunk.start + 1 + count]
        parameters = self._parameters[[q.slot for _, q in changed]]
        self._staging.begin()
        columns = self._staging.upload(np.ascontiguousarray(parameters.T))
        temperatures, top_k, top_p, min_p, repetition, presence, frequency, num_prompt = columns
        filters = Filters(temperatures, top_k, top_p, min_p)
        penalties = Penalties(repetition, presence, frequency)
        extras = StepExtras(
            rows=self._int64([row for row, _ in changed]),
            all_rows=len(changed) == num_sampled,
            filters=filters if any(q.sampling.filters for _, q in changed) else None,
            penalties=penalties if any(q.sampling.penalizes for _, q in changed) else None,
            num_prompt=num_prompt,
            withheld=self._int64(list(zip(*withheld, strict=True))) if withheld else None,
            processors=[
                (i, tuple(q.sampling.logits_processors))
                for i, (_, q) in enumerate(changed)
                if q.sampling.logits_processors
            ],
            new=new,
            prompts=prompts,
            num_chunks=len(plan.prefill),
            scored_rows=self._int64([row for row, _ in new]),
            prompt_rows=self._int64(prompt_rows),
            prompt_tokens=self._int64(prompt_tokens),
        )
        self._staging.end()
        return extras

    def _int64(self, values: Any) -> Tensor:
        return self._staging.upload(np.array(values, dtype=np.int64))


def _changes(new: NewRequest) -> bool:
    """Whether its tokens are drawn from other logits than the model's."""
    s = new.sampling
    return bool(s.filters or s.penalizes or new.stop_token_ids or s.logits_processors)


def _parameters(new: NewRequest) -> tuple[float, ...]:
    """A request's columns; float32 holds integers up to 2^24 exactly."""
    s = new.sampling
    num_prompt = len(new.token_ids) - new.num_output_tokens
    # A top_p that float32 took for 0 would be reached by nothing.
    filters = (s.temperature, min(s.top_k, 1 << 24), max(s.top_p, 1e-30), s.min_p)
    return *filters, s.repetition_penalty, s.presence_penalty, s.frequency_penalty, num_prompt


def _processed(call: LogitsProcessor, token_ids: list[int], logits: Tensor) -> Tensor:
    out = call(token_ids, logits)
    if not isinstance(out, Tensor) or out.shape != logits.shape:
        raise TypeError(
            f"logits processor {call!r} must return a tensor of shape {tuple(logits.shape)}"
        )
    return out
