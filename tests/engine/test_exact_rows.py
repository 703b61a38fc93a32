"""A request's tokens and log-probabilities are those that it gets alone, whoever is in the step."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.hidden_rows import Forwarded
from engine.types import NewRequest, PrefillChunk, StepPlan
from layers.parallel import ParallelContext, Place
from layers.sampler import Sampler
from layers.step_rows import SampledRows
from sampling_params import SamplingParams
from tests.engine.test_sampling_rows import _Rows
from tests.layers.tensors import keys

# Odd, so that rows of a block begin at addresses of every alignment.
VOCAB_SIZE = 1003


def _softened(ids: list[int], x: Tensor) -> Tensor:
    """A processor whose torch operations could follow the row's place."""
    return x.log_softmax(0) + x.softmax(0) * len(ids)


KINDS: list[dict[str, Any]] = [
    {},
    {"logprobs": 3},
    {"logprobs": 0, "top_p": 0.8},
    {"top_k": 40, "min_p": 0.01},
    {"repetition_penalty": 1.3, "logprobs": 5},
    {"frequency_penalty": 0.4, "presence_penalty": 0.2, "top_p": 0.9},
    {"logits_processors": [_softened], "logprobs": 2},
    {"logits_processors": [_softened], "top_k": 30, "temperature": 0.0},
    {"temperature": 0.0, "logprobs": 1},
    {"min_tokens": 9},
    {"logit_bias": {i: 0.3 * i for i in range(20)}, "repetition_penalty": 1.1, "logprobs": 2},
    {"allowed_token_ids": list(range(100, 700)), "top_p": 0.9},
    {"bad_words_ids": [[i] for i in range(9)] + [[i, j] for i in range(9) for j in range(9)]},
]


def request_of(slot: int) -> NewRequest:
    params = SamplingParams(**{"temperature": 0.9, **KINDS[slot % len(KINDS)]})
    withheld = tuple(range(20)) if params.min_tokens else ()
    prompt = tuple(random.Random(slot).choices(range(50), k=6))
    return NewRequest(slot, slot, prompt, params, slot, 3, withheld)


def drawn(requests: list[NewRequest], logits: Tensor) -> list[Any]:
    """Token and log-probabilities of each request; row i of `logits` is that of slot i."""
    count, device = len(requests), logits.device
    news = tuple(replace(q, slot=i) for i, q in enumerate(requests))
    chunks = tuple(PrefillChunk(i, 0, len(q.token_ids), True) for i, q in enumerate(news))
    rows = _Rows(count, device, VOCAB_SIZE)
    rows.of(StepPlan(0, news, prefill=chunks))
    special = rows.of(StepPlan(1, decode=tuple(range(count))))
    places = torch.arange(count, device=device)
    sampled = SampledRows(
        rows=places,
        slots=places,
        positions=torch.tensor([len(q.token_ids) for q in news], device=device),
        temperatures=torch.tensor([q.sampling.temperature for q in news], device=device),
        seeds=keys([q.seed for q in news]).to(device),
        tokens=torch.zeros_like(places),
    )
    own = logits[[q.slot for q in requests]]
    sampler = Sampler(Place(ParallelContext(), logits.dtype, device))
    if special is None:
        return [(token, []) for token in sampler(own, sampled).tolist()]
    known = torch.tensor([[*q.token_ids, 0, 0] for q in news], dtype=torch.int32, device=device)
    made = Forwarded(own, [])
    tokens, scored, _ = special.draw(sampler, known, made, sampled, lambda x: x)
    logprobs: list[Any] = scored.logprobs(count)[0] if scored else [[]] * count
    return list(zip(tokens.tolist(), logprobs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kind_of_request_gets_in_any_company_what_it_gets_alone(dtype: torch.dtype) -> None:
    count = 7 * len(KINDS)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(count, VOCAB_SIZE, generator=generator) * 3).to(dtype)
    check_in_company(logits, (count, count, 30, 3, 2))


def check_in_company(logits: Tensor, sizes: tuple[int, ...]) -> None:
    """Each request draws from its row alone, then among as many random ones as `sizes` say."""
    requests = [request_of(slot) for slot in range(len(logits))]
    alone = [drawn([q], logits)[0] for q in requests]
    assert len({token for token, _ in alone}) > len(logits) // 2
    shuffled = random.Random(2)
    for size in sizes:
        company = shuffled.sample(requests, size)
        for q, got in zip(company, drawn(company, logits), strict=True):
            assert got == alone[q.slot]


def test_a_request_without_a_choice_changes_no_other() -> None:
    logits = torch.randn(20, VOCAB_SIZE, generator=torch.Generator().manual_seed(3)).bfloat16()
    requests = [request_of(slot) for slot in range(20)]
    before = drawn(requests, logits)
    logits[1, 7] = float("nan")
    logits[13] = float("-inf")
    after = drawn(requests, logits)
    assert [i for i in range(20) if after[i] != before[i]] == [1, 13]
    assert after[1][0] == after[13][0] == -1


def test_a_processor_gets_logits_at_an_aligned_address() -> None:
    """Row 1 of a block does not begin at one, and vector instructions could give other bits."""
    seen: list[int] = []

    def looks(ids: list[int], x: Tensor) -> Tensor:
        seen.append(x.data_ptr() % 64)
        return x.mul_(0.5)  # in place, which a processor may do

    params = SamplingParams(temperature=0.0, logits_processors=[looks])
    requests = [NewRequest(i, i, (1, 2), params, i) for i in range(5)]
    logits = torch.randn(5, VOCAB_SIZE)
    assert [token for token, _ in drawn(requests, logits)] == logits.argmax(1).tolist()
    assert set(seen) == {0}
