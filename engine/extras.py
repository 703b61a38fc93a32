"""What a step's requests ask beyond temperature and seed, and the rows that it concerns.

Most steps have no such request and pay for one look at an empty dictionary. The others run the
same forward pass. Filters are a bound on the logits to draw from, for every row of the step; rows
that need other logits than the model's are drawn anew, a block of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.staging import Staging
from engine.types import NewRequest, StepPlan, TokenLogprobs
from layers.logits import (
    SCORED_ROWS,
    Filters,
    Penalties,
    TokenScores,
    penalize,
    score,
    thresholds,
)
from layers.sampler import Sampler
from sampling_params import LogitsProcessor
from utils.errors import StepError

# Rows whose logits are rewritten at once. Each takes its logits, a float32 copy and the penalties'
# counts: 97 MB for 64 rows of 151,936 bfloat16 logits, whatever the batch.
BLOCK_ROWS = 64

# Temperatures, seeds and positions of the tokens to be drawn.
Keys = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a step's R new tokens are drawn from.

    Attributes:
        logits: [R, this rank's columns], then rows of prompts if there are any wanted.
        slots: [R] of the new tokens.
        keys: their temperatures, seeds and positions.
        store: puts the tokens drawn [R] where the next step reads them.
    """

    logits: Tensor
    slots: Tensor
    keys: Keys
    store: Callable[[Tensor], None]

    @staticmethod
    def joined(parts: Sequence[StepLogits]) -> StepLogits:
        """One after the other; without rows of prompts."""
        temperatures, seeds, positions = zip(*(part.keys for part in parts), strict=True)

        def store(tokens: Tensor) -> None:
            shares = torch.split(tokens, [len(part.slots) for part in parts])
            for part, share in zip(parts, shares, strict=True):
                part.store(share)

        return StepLogits(
            logits=torch.cat([part.logits for part in parts]),
            slots=torch.cat([part.slots for part in parts]),
            keys=(torch.cat(temperatures), torch.cat(seeds), torch.cat(positions)),
            store=store,
        )


def extras_bytes(max_num_seqs: int, vocab_size: int, dtype_bytes: int, num_ranks: int) -> int:
    """Most device memory in bytes that special rows take beyond a plain step of a captured size.

    That is where a decode step's logits stay, a copy beside those of a prefill, with ranks their
    gathering and its sum, and the larger of the blocks: of rows to rewrite or to score, two of
    float32 and a copy for each.
    """
    copies = (2 if num_ranks == 1 else 4) * max_num_seqs * dtype_bytes
    block = min(max_num_seqs, max(BLOCK_ROWS, SCORED_ROWS)) * (dtype_bytes + 8)
    return (copies + block) * vocab_size


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

    def logprobs(
        self, num_rows: int
    ) -> tuple[list[list[TokenLogprobs]], list[list[TokenLogprobs]]]:
        """Those of new tokens and of prompts, as in `StepResult`; the scores are on the host.

        Args:
            num_rows: rows of new tokens.
        """
        s = self.scores
        columns = (s.tokens, s.values, s.top_tokens, s.top_values)
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
class Rewritten:
    """Up to `BLOCK_ROWS` of a step's rows, S, that are drawn from other logits than the model's.

    Attributes:
        rows: [S] int64 places among the step's new tokens.
        filters: None if there are none, as the following ones.
        penalties: None if there are none.
        num_prompt: [S] prompt lengths.
        withheld: [3, W] int64: row of the S, token, position from which it may be chosen.
        processors: (row of the S, what to call) of those that have any.
    """

    rows: Tensor
    filters: Filters | None
    penalties: Penalties | None
    num_prompt: Tensor
    withheld: Tensor | None
    processors: list[tuple[int, tuple[LogitsProcessor, ...]]]

    def draw(
        self, sampler: Sampler, tokens: Tensor, logits: Tensor, slots: Tensor, keys: Keys
    ) -> Tensor:
        """[S] int64 tokens; logits, slots and keys, whole rows, are those of all R."""
        temperatures, seeds, positions = (key[self.rows] for key in keys)
        changed = logits.index_select(0, self.rows).float()
        self._rewrite(changed, tokens, slots[self.rows], positions)
        least = thresholds(changed, self.filters) if self.filters else None
        return sampler.whole(changed, temperatures, seeds, positions, least=least)

    def _rewrite(self, logits: Tensor, tokens: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Change [S, V] float32 logits in place; slots and positions are [S]."""
        if self.penalties:
            known = tokens.index_select(0, slots)
            penalize(logits, known, self.num_prompt, positions, self.penalties)
        if self.withheld is not None:
            row, token, first = self.withheld
            free = positions[row] >= first
            logits[row, token] = torch.where(free, logits[row, token], float("-inf"))
        for i, calls in self.processors:
            ids = tokens[slots[i], : positions[i]].tolist()
            for call in calls:
                logits[i] = _processed(call, ids, logits[i])


@dataclass(frozen=True, slots=True)
class StepExtras:
    """What is special about one step's R new tokens.

    Attributes:
        filters: of all R, neutral for plain and rewritten rows; None if all are.
        rewritten: the rows to be drawn from other logits.
        all_rewritten: there are no others.
        new, prompts: as in `Scored`.
        scored_rows: [len(new)] int64 places among the R.
        prompt_rows, prompt_tokens: [P] int64 rows of the step's T tokens, and those that follow.
    """

    filters: Filters | None
    rewritten: list[Rewritten]
    all_rewritten: bool
    new: list[tuple[int, int]]
    prompts: list[tuple[int, int, int]]
    num_chunks: int
    scored_rows: Tensor
    prompt_rows: Tensor
    prompt_tokens: Tensor

    def draw(
        self, sampler: Sampler, tokens: Tensor, step: StepLogits
    ) -> tuple[Tensor, Scored | None]:
        """Draw the step's tokens and store them.

        Args:
            tokens: [slots, max_model_len] token ids of each slot so far.
            step: with `prompt_rows` behind its new tokens' rows.

        Returns:
            [R] int64 tokens, and the log-probabilities that were asked for.
        """
        slots, keys, count = step.slots, step.keys, len(step.slots)
        whole = sampler.gathered(step.logits)
        if self.all_rewritten:
            drawn = torch.empty(count, dtype=torch.int64, device=whole.device)
        else:
            least = thresholds(whole[:count], self.filters) if self.filters else None
            drawn = sampler(step.logits[:count], *keys, least=least)
        for part in self.rewritten:
            anew = part.draw(sampler, tokens, whole[:count], slots, keys)
            drawn.index_copy_(0, part.rows, anew)
        step.store(drawn)
        return drawn, self._scored(whole[:count], drawn, whole[count:])

    def _scored(self, logits: Tensor, tokens: Tensor, prompt_logits: Tensor) -> Scored | None:
        """Log-probabilities by [R, V] logits as the model made them."""
        if not self.new and not self.prompts:
            return None
        num_top = max(n for *_, n in (*self.new, *self.prompts))
        new = score(logits, tokens[self.scored_rows], num_top, self.scored_rows)
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
        rewritten = [(row, q) for row, q in special if _rewrites(q)]
        new = [(r, q.sampling.logprobs) for r, q in special if q.sampling.logprobs is not None]
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
        self._staging.begin()
        extras = StepExtras(
            filters=self._filters(special, num_sampled),
            rewritten=[
                self._rewritten(rewritten[start : start + BLOCK_ROWS])
                for start in range(0, len(rewritten), BLOCK_ROWS)
            ],
            all_rewritten=len(rewritten) == num_sampled,
            new=new,
            prompts=prompts,
            num_chunks=len(plan.prefill),
            scored_rows=self._int64([row for row, _ in new]),
            prompt_rows=self._int64(prompt_rows),
            prompt_tokens=self._int64(prompt_tokens),
        )
        self._staging.end()
        return extras

    def _filters(self, special: list[tuple[int, NewRequest]], num_sampled: int) -> Filters | None:
        """Filters of all rows, with temperature 0, and so none, where they do not apply."""
        rows = [(row, q) for row, q in special if q.sampling.filters and not _rewrites(q)]
        if not rows:
            return None
        columns = np.zeros((4, num_sampled), dtype=np.float32)
        columns[:, [row for row, _ in rows]] = self._parameters[[q.slot for _, q in rows], :4].T
        return Filters(*self._staging.upload(columns))

    def _rewritten(self, rows: list[tuple[int, NewRequest]]) -> Rewritten:
        withheld = [
            (i, token, len(q.token_ids) - q.num_output_tokens + q.sampling.min_tokens)
            for i, (_, q) in enumerate(rows)
            for token in q.withheld_token_ids
        ]
        parameters = self._parameters[[q.slot for _, q in rows]]
        columns = self._staging.upload(np.ascontiguousarray(parameters.T))
        temperatures, top_k, top_p, min_p, repetition, presence, frequency, num_prompt = columns
        filters = Filters(temperatures, top_k, top_p, min_p)
        penalties = Penalties(repetition, presence, frequency)
        return Rewritten(
            rows=self._int64([row for row, _ in rows]),
            filters=filters if any(q.sampling.filters for _, q in rows) else None,
            penalties=penalties if any(q.sampling.penalizes for _, q in rows) else None,
            num_prompt=num_prompt,
            withheld=self._int64(list(zip(*withheld, strict=True))) if withheld else None,
            processors=[
                (i, tuple(q.sampling.logits_processors))
                for i, (_, q) in enumerate(rows)
                if q.sampling.logits_processors
            ],
        )

    def _int64(self, values: Any) -> Tensor:
        return self._staging.upload(np.array(values, dtype=np.int64))


def _rewrites(new: NewRequest) -> bool:
    """Whether its tokens are drawn from other logits than the model's."""
    s = new.sampling
    return bool(s.penalizes or new.withheld_token_ids or s.logits_processors)


def _parameters(new: NewRequest) -> tuple[float, ...]:
    """A request's columns; float32 holds integers up to 2^24 exactly."""
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
