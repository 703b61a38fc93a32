"""Sampling options besides temperature and seed, for the sampled rows of a step.

In this file a row of a step is one input token. The R sampled rows of a step are the rows whose
next token is drawn. Filters (top-k, top-p, min-p) give each row a lower bound: tokens with logits
below the bound are not drawn. Rows whose logits are changed are drawn in blocks
(`engine.changed_rows`), after the tokens of all other rows. Log-probabilities come last
(`engine.step_scores`). If no option of a request applies any more, its rows cost nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import Config
from engine.changed_rows import (
    BLOCK_ROWS,
    Candidate,
    ChangedRows,
    OwnOptions,
    block_bytes,
    changes,
    options_bytes,
)
from engine.device_state import Staging
from engine.hidden_rows import Forwarded, HiddenRows
from engine.step_scores import PROMPT_ROWS, Group, ScoredRows, StepScores, group_of
from engine.types import NO_LIMIT, NewRequest, StepPlan
from layers.logits import SCORED_ROWS, Filters, logit_bounds
from layers.sampler import Sampler
from layers.step_rows import SampledRows
from utils.errors import LogitsError


def special_bytes(config: Config, vocab_size: int, hidden_size: int, dtype_bytes: int) -> int:
    """Return how many bytes of device memory the sampling options of a step take at most.

    Changed rows are drawn block by block, and rows are scored block by block. Scores need a copy of
    the logits of a block, and up to 8 bytes for each logit to find the likeliest tokens. With
    several ranks, two more copies hold the logits of all rows, or of a block of prompt rows. If the
    log-probabilities of a prompt are wanted, the last layer returns the states of all its tokens,
    in two tensors.
    """
    assert config.max_model_len is not None
    rows, copies = config.max_num_seqs, 0 if config.tensor_parallel_size == 1 else 2
    changed = block_bytes(rows, vocab_size, dtype_bytes, config.max_model_len)
    scored = min(rows, SCORED_ROWS) * vocab_size * (dtype_bytes + 8)
    prompt_rows = min(PROMPT_ROWS, config.max_num_batched_tokens)
    prompts = prompt_rows * (1 + copies) * dtype_bytes + min(prompt_rows, SCORED_ROWS) * 8
    states = 2 * config.max_num_batched_tokens * hidden_size * dtype_bytes
    work = max(changed, scored, prompts * vocab_size + states)
    return work + copies * rows * vocab_size * dtype_bytes + rows * options_bytes(vocab_size)


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
        scored: the rows that are scored, or None if no request asks for log-probabilities.
        hidden: the rows whose hidden states are wanted, or None if there are none.
    """

    parameters: Tensor
    filters: Filters | None
    changed: list[ChangedRows]
    all_changed: bool
    scored: ScoredRows | None
    hidden: HiddenRows | None

    @property
    def draws(self) -> bool:
        """Whether an option changes how tokens are drawn, or scores them."""
        return bool(self.changed or self.filters or self.scored)

    @property
    def prompt_rows(self) -> list[Tensor]:
        """Indices in the step, int64 [P], of prompt rows for which last states are needed.

        The list has at most two tensors: first the rows to score, then those whose final hidden
        states are wanted.
        """
        scored = self.scored.prompt_rows if self.scored and self.scored.prompts else None
        hidden = self.hidden.prompt_rows if self.hidden else None
        return [rows for rows in (scored, hidden) if rows is not None]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose inputs are wanted."""
        return tuple(self.hidden.inner) if self.hidden else ()

    def draw(
        self,
        sampler: Sampler,
        tokens: Tensor,
        made: Forwarded,
        sampled: SampledRows,
        head: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, StepScores | None, dict[int, LogitsError]]:
        """Draw the step's tokens. Returns `tokens`, `scores` and `errors` of `StepOutput`.

        Args:
            tokens: [slots + 1, max_model_len]: prompt and output tokens of each running request.
            made: the logits, and the last states of prompt rows to score.
            head: computes logits from last states, which are those before the final norm.
        """
        logits = made.logits
        whole = sampler.gathered(logits)
        if self.all_changed:
            drawn = torch.empty(len(sampled.slots), dtype=torch.int64, device=whole.device)
        else:
            least = logit_bounds(whole, self.filters) if self.filters else None
            drawn = sampler(logits, sampled, least=least)
        errors: dict[int, LogitsError] = {}
        for part in self.changed:
            anew, failed = part.draw(sampler, tokens, whole, sampled, self.parameters)
            drawn.index_copy_(0, part.rows, anew)
            errors |= {int(part.rows[i]): error for i, error in failed.items()}
        if self.scored is None:
            return drawn, None, errors
        # Log-probabilities come from the unchanged logits.
        prompts = made.prompts[0] if made.prompts else whole[:0]
        scores = self.scored.score(sampler, whole, drawn.clamp(min=0), head, prompts)
        return drawn, scores, errors


class SamplingRows:
    """Makes the `SpecialRows` of each plan, for a runner that drafts no tokens.

    Args:
        requests: requests with sampling options besides temperature and seed; the keys are slots.
        staging: copies arrays to the device. Call `of` within `staging.group()`.
    """

    def __init__(
        self,
        requests: Mapping[int, NewRequest],
        num_slots: int,
        staging: Staging,
        vocab_size: int,
        num_layers: int,
    ) -> None:
        self._staging, self._vocab_size, self._num_layers = staging, vocab_size, num_layers
        self._requests = requests
        self._own: dict[int, OwnOptions] = {}  # of the latest request with options in each slot
        self._parameters = np.zeros((num_slots, 8), dtype=np.float32)
        # Number of tokens that each slot's request has before its next token is drawn. The tokens
        # are on the device. Their number is known here: every decode row adds one.
        self._num_known = np.zeros(num_slots, dtype=np.int64)
        self._decode: tuple[int, ...] | None = None
        self._slots = np.zeros(0, dtype=np.int64)  # the slots in `_decode`
        self._decode_rows: SpecialRows | None = None
        self._lasts = 0  # for how many further steps with the same decodes `_decode_rows` is right

    def of(self, plan: StepPlan) -> SpecialRows | None:
        """Return the sampling options of a plan's sampled rows, or None if none applies to any.

        `of` stores new requests' options, so call it for every plan while `requests` has entries.
        """
        for new in plan.new_requests:
            self._parameters[new.slot] = _parameters(new)
            self._num_known[new.slot] = len(new.token_ids)
            self._own.pop(new.slot, None)
            if new.slot in self._requests:
                self._own[new.slot] = OwnOptions.of(new, self._vocab_size, self._staging)
        same = plan.decode == self._decode
        if not same:
            self._decode, self._slots = plan.decode, np.array(plan.decode, dtype=np.int64)
        self._num_known[self._slots] += 1
        self._lasts -= 1
        if plan.prefill or plan.new_requests:
            found, self._lasts = self._found(plan), -1
            return found
        if not same or self._lasts < 0:
            self._decode_rows = self._found(plan)
        return self._decode_rows

    def _found(self, plan: StepPlan) -> SpecialRows | None:
        slots, num_known = plan.sampled_slots, self._num_known
        held = [(row, s, new) for row, s in enumerate(slots) if (new := self._requests.get(s))]
        rows = [Candidate(row, new, self._own[s], int(num_known[s])) for row, s, new in held]
        changed = [one for one in rows if changes(one.new, one.num_known)]
        # A block is as wide as its longest row with penalties.
        changed.sort(key=lambda one: one.num_known if one.new.sampling.penalizes else 0)
        blocks = [
            ChangedRows.of(changed[first : first + BLOCK_ROWS], self._staging)
            for first in range(0, len(changed), BLOCK_ROWS)
        ]
        self._lasts = min((block.lasts for block in blocks), default=NO_LIMIT)
        filtered = [
            one.row
            for one in rows
            if one.new.sampling.filters and not changes(one.new, one.num_known)
        ]
        scored = self._scored(rows, plan)
        hidden = HiddenRows.of(plan, self._requests, self._num_layers, self._int64)
        if not (changed or filtered or scored or hidden):
            return None
        parameters = np.ascontiguousarray(self._parameters[slots].T)
        # Only rows in `filtered` get filters. Temperature 0 turns filtering off for all other rows.
        filters = np.zeros_like(parameters[:4])
        filters[:, filtered] = parameters[:4, filtered]
        return SpecialRows(
            parameters=self._staging.upload(parameters),
            filters=Filters(*self._staging.upload(filters)) if filtered else None,
            changed=blocks,
            all_changed=len(changed) == len(slots),
            scored=scored,
            hidden=hidden,
        )

    def _scored(self, rows: list[Candidate], plan: StepPlan) -> ScoredRows | None:
        asked = [(one.row, one.new.sampling) for one in rows]
        new = [(r, s.logprobs_details, s.logprobs) for r, s in asked if s.logprobs is not None]
        prompts = self._of_prompts(plan)
        if not new and not prompts:
            return None
        groups: dict[Group, list[int]] = {}
        for row, ranked, num_top in new:
            groups.setdefault(group_of(num_top, ranked=ranked), []).append(row)
        # For each group the scored prompt rows, and the prompt token after each row.
        parts: dict[Group, tuple[list[int], list[int]]] = {}
        for _, ranked, num_top, part_rows, part_tokens in prompts:
            both = parts.setdefault(group_of(num_top, ranked=ranked), ([], []))
            both[0].extend(part_rows)
            both[1].extend(part_tokens)
        return ScoredRows(
            new=new,
            prompts=[(i, len(part), ranked, num_top) for i, ranked, num_top, part, _ in prompts],
            num_chunks=len(plan.prefill),
            new_rows={group: self._int64(some) for group, some in groups.items()},
            prompt_rows=self._int64([row for some, _ in parts.values() for row in some]),
            prompt_tokens=self._int64([token for _, some in parts.values() for token in some]),
            prompt_counts={group: len(some) for group, (some, _) in parts.items()},
        )

    def _of_prompts(self, plan: StepPlan) -> list[tuple[int, bool, int, range, tuple[int, ...]]]:
        """Return for each chunk with scored prompt rows what is scored.

        That is the chunk's index, whether ranks are wanted, N, the chunk's rows and their tokens.
        """
        found = []
        row = 0
        for i, chunk in enumerate(plan.prefill):
            new = self._requests.get(chunk.slot)
            if new is not None and (num_top := new.sampling.prompt_logprobs) is not None:
                first = max(chunk.start + 1, new.sampling.prompt_logprobs_start)
                num_prompt = len(new.token_ids) - new.num_output_tokens
                end = min(chunk.start + chunk.num_tokens + 1, num_prompt)
                if first < end:
                    rows = range(row + first - chunk.start - 1, row + end - chunk.start - 1)
                    ranked = new.sampling.logprobs_details
                    found.append((i, ranked, num_top, rows, new.token_ids[first:end]))
            row += chunk.num_tokens
        return found

    def _int64(self, values: list[int]) -> Tensor:
        return self._staging.upload(np.array(values, dtype=np.int64))


def _parameters(new: NewRequest) -> tuple[float, ...]:
    """Return a request's temperature, top_k, top_p, min_p, its 3 penalties and prompt length."""
    s = new.sampling
    num_prompt = len(new.token_ids) - new.num_output_tokens
    # The caller stores the values as float32, which is exact for integers up to 2^24. A tiny top_p
    # would become 0 in float32, and 0 is not a valid top_p.
    filters = (s.temperature, min(s.top_k, 1 << 24), max(s.top_p, 1e-30), s.min_p)
    return *filters, s.repetition_penalty, s.presence_penalty, s.frequency_penalty, num_prompt
