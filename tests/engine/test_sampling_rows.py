"""Steps with special rows: drawn in blocks of bounded size, whatever the batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import engine.sampling_rows
from config import Config
from engine.changed_rows import BLOCK_ROWS, block_bytes, options_bytes
from engine.device_state import DeviceState, Staging
from engine.hidden_rows import Forwarded
from engine.sampling_rows import SamplingRows, SpecialRows, special_bytes
from engine.step_scores import PROMPT_ROWS
from engine.types import NewRequest, PrefillChunk, StepPlan
from layers.logits import SCORED_ROWS, Filters, logit_bounds_reference
from layers.sampler import NO_TOKEN, Sampler, gumbel_noise
from layers.step_rows import SampledRows, SlotTables
from sampling_params import SamplingParams
from tests.layers.tensors import keys, place

VOCAB_SIZE = 96
CPU = torch.device("cpu")


class _Rows:
    """The sampling options of plans, found as a runner finds them."""

    def __init__(
        self,
        num_slots: int,
        device: torch.device = CPU,
        vocab_size: int = VOCAB_SIZE,
        max_len: int = 64,
    ) -> None:
        self._staging = Staging(device)
        tables = SlotTables.zeros(num_slots, max_len, 16, device)
        self._state = DeviceState(tables, self._staging)
        self._rows = SamplingRows(self._state.special, num_slots, self._staging, vocab_size, 3)

    def of(self, plan: StepPlan) -> SpecialRows | None:
        with self._staging.group():
            self._state.apply(plan)
            return self._rows.of(plan) if self._state.special else None


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements that one operation has written."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and not func.is_view:
                self.numel = max(self.numel, x.numel())
        return out


class _Greedy(Sampler):
    """Draws without the noise, which the reference makes for all rows at once."""

    def __call__(
        self, logits: Tensor, sampled: SampledRows, *, least: Tensor | None = None
    ) -> Tensor:
        return self.greedy(logits)


def _drawn(
    params: list[SamplingParams], sampler: Sampler | None = None
) -> tuple[list[int], list[Any], int]:
    """Tokens and log-probabilities of one step, and the most elements written at once."""
    largest = _Largest()
    tokens, logprobs, _ = _scored(params, sampler, largest)
    return tokens, logprobs, largest.numel


def _scored(
    params: list[SamplingParams],
    sampler: Sampler | None = None,
    watched: AbstractContextManager[Any] | None = None,
) -> tuple[list[int], list[Any], list[Any]]:
    """Tokens of one step, their log-probabilities, and those of the prompts."""
    count = len(params)
    plan = StepPlan(
        0,
        new_requests=tuple(NewRequest(i, i, (i % 7, 5), p, i) for i, p in enumerate(params)),
        prefill=tuple(PrefillChunk(i, 0, 2, True) for i in range(count)),
    )
    special = _Rows(count).of(plan)
    assert special is not None
    tokens = torch.tensor([[i % 7, 5, 0, 0] for i in range(count)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(count, VOCAB_SIZE, generator=generator).bfloat16() * 3
    of_step = torch.randn(2 * count, VOCAB_SIZE, generator=generator).bfloat16() * 3
    prompt_rows = special.prompt_rows
    # The states are logits already.
    made = Forwarded(logits, [], [of_step[rows] for rows in prompt_rows])
    sampled = SampledRows(
        rows=torch.arange(count),
        slots=torch.arange(count),
        positions=torch.full((count,), 2),
        temperatures=torch.tensor([p.temperature for p in params]),
        seeds=keys(torch.arange(count)),
        tokens=torch.zeros(count, dtype=torch.int64),
    )
    sampler = sampler or Sampler(place(dtype=torch.bfloat16))
    with watched or nullcontext():
        drawn, scored, _ = special.draw(sampler, tokens, made, sampled, lambda x: x)
    new, prompts = scored.logprobs(count) if scored else ([], [])
    return drawn.tolist(), new, prompts


def _params(index: int) -> SamplingParams:
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.4, "top_k": 5},
        {"top_p": 0.7, "logprobs": 1},
        {"frequency_penalty": 0.5, "logits_processors": [lambda ids, x: x - 3.0 * len(ids)]},
        {},
        {"min_p": 0.3},
    ]
    return SamplingParams(temperature=1.2, **kinds[index % len(kinds)])


def test_blocks_of_rows_draw_what_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [_params(i) for i in range(50)]
    tokens, logprobs, _ = _drawn(params)
    assert len(set(tokens)) > 10
    assert sum(map(bool, logprobs)) == 10
    for rows in (1, 3, 20):
        monkeypatch.setattr(engine.sampling_rows, "BLOCK_ROWS", rows)
        assert _drawn(params)[:2] == (tokens, logprobs)


@pytest.mark.parametrize("special", [{"repetition_penalty": 1.2, "top_k": 9}, {"logprobs": 3}])
def test_special_rows_are_worked_through_in_blocks(special: dict[str, Any]) -> None:
    params = [SamplingParams(temperature=0.0, **special)] * (5 * SCORED_ROWS)
    *_, numel = _drawn(params, _Greedy(place(dtype=torch.bfloat16)))
    assert numel <= max(BLOCK_ROWS, SCORED_ROWS) * VOCAB_SIZE


def _bytes(num_seqs: int, ranks: int = 1, hidden_size: int = 1, max_len: int = 300) -> int:
    """What options take but for the requests' own entries, with 1,000 bfloat16 logits a row."""
    sizes: dict[str, Any] = {"max_num_seqs": num_seqs, "max_model_len": max_len}
    sizes |= {"max_num_batched_tokens": 2048, "tensor_parallel_size": ranks}
    config = Config(model="m", **sizes)
    return special_bytes(config, 1000, hidden_size, 2) - num_seqs * options_bytes(1000)


def test_what_special_rows_take_is_bounded_but_for_gathered_logits() -> None:
    # A block of logits of prompt rows, what it takes to score a part of them, and 2,048 states.
    prompts = PROMPT_ROWS * 1000 * 2 + SCORED_ROWS * 1000 * 8
    assert _bytes(512) == _bytes(1024) == prompts + 2 * 2048 * 1 * 2
    assert _bytes(512, hidden_size=64) == prompts + 2 * 2048 * 64 * 2
    # Ranks gather whole rows, and add them up.
    whole = 2 * 512 * 1000 * 2
    gathered = 2 * PROMPT_ROWS * 1000 * 2
    assert _bytes(512, ranks=2) == prompts + gathered + 2 * 2048 * 1 * 2 + whole
    # Penalties read the tokens of a block.
    assert _bytes(512, max_len=1 << 17) == block_bytes(512, 1000, 2, 1 << 17)
    assert block_bytes(4, 1000, 2, 300) == 4 * (1000 * (2 + 8) + 300 * 36)
    assert block_bytes(512, 1000, 2, 300) == BLOCK_ROWS * (1000 * (2 + 8) + 300 * 36)


def _narrowed(entry: dict[int, float], token: int, num_top: int) -> dict[int, float]:
    """What is left of a request's log-probabilities if it had asked for fewer."""
    best = sorted(entry.items(), key=lambda item: item[1], reverse=True)
    return {token: entry[token], **dict(best[:num_top])}


@pytest.mark.parametrize("wanted", [[1, 6], [6, 1], [0, 3, 6, 3, 0], [6, 0]])
@pytest.mark.parametrize("kind", ["logprobs", "prompt_logprobs"])
def test_each_request_gets_as_many_log_probabilities_as_it_asked_for(
    kind: str, wanted: list[int]
) -> None:
    """The step's most are computed for all rows, and each request gets its part of them."""

    def of(counts: list[int]) -> tuple[list[int], list[Any]]:
        params = [SamplingParams(temperature=1.0, **{kind: n}) for n in counts]  # type: ignore[arg-type]
        tokens, new, prompts = _scored(params)
        return (tokens, new) if kind == "logprobs" else ([5] * len(counts), prompts)

    tokens, all_wide = of([6] * len(wanted))
    narrow_tokens, got = of(wanted)
    assert narrow_tokens == tokens
    for token, (wide,), (entry,), num_top in zip(tokens, all_wide, got, wanted, strict=True):
        assert entry == _narrowed(wide, token, num_top)
        assert len(entry) in (num_top, num_top + 1)


def test_a_prompt_and_a_new_token_may_want_different_numbers() -> None:
    for new_wanted, prompt_wanted in ((1, 5), (5, 1)):
        wants = SamplingParams(temperature=0.0, logprobs=new_wanted, prompt_logprobs=prompt_wanted)
        _, ((new,),), ((prompt,),) = _scored([wants])
        assert len(new) == new_wanted
        assert len(prompt) in (prompt_wanted, prompt_wanted + 1)


def test_prompts_are_scored_at_their_own_rows_and_to_their_end() -> None:
    """Behind another request's chunk, and without the output that a preempted request has."""
    wants = SamplingParams(prompt_logprobs=1)
    news = (
        NewRequest(0, 0, (1, 2, 3), SamplingParams(), 0),
        NewRequest(1, 1, (11, 12, 13, 14), wants, 0, num_output_tokens=1),
    )
    chunks = (PrefillChunk(0, 0, 3, True), PrefillChunk(1, 0, 4, True))
    special = _Rows(2).of(StepPlan(0, news, prefill=chunks))
    assert special is not None
    assert special.scored is not None
    assert special.scored.prompts == [(1, 2, False, 1)]
    assert special.scored.prompt_rows.tolist() == [3, 4]
    assert special.scored.prompt_tokens.tolist() == [12, 13]


def test_decodes_have_the_options_of_who_holds_the_slots_now() -> None:
    rows, step = _Rows(2), 0
    for first, expected in ((1, [(0, 1), (1, 0)]), (3, [(0, 3), (1, 0)]), (None, [(1, 0)])):
        held = {0: first, 1: 0} if step == 0 else {0: first}
        news = tuple(
            NewRequest(slot, step + slot, (1, 2), SamplingParams(logprobs=wanted), 0)
            for slot, wanted in held.items()
        )
        chunks = tuple(PrefillChunk(slot, 0, 2, True) for slot in held)
        rows.of(StepPlan(step, news, prefill=chunks))
        for later in (1, 2):
            special = rows.of(StepPlan(step + later, decode=(0, 1)))
            assert special is not None
            assert special.scored is not None
            assert special.scored.new == [(row, False, wanted) for row, wanted in expected]
            rows_of = special.scored.new_rows.values()
            assert [rows.tolist() for rows in rows_of] == [[n] for n, _ in expected] or [
                [row for row, _ in expected]
            ]
        step += 3


@pytest.mark.parametrize(("position", "token"), [(5, 3), (6, 7)])
def test_tokens_are_withheld_until_the_output_is_long_enough(position: int, token: int) -> None:
    """Of a request with a prompt of three tokens, preempted after its first one of output."""
    params = SamplingParams(temperature=0.0, min_tokens=3)
    new = NewRequest(0, 0, (1, 2, 3, 4), params, 0, 1, withheld_token_ids=(7,))
    rows = _Rows(1)
    rows.of(StepPlan(0, (new,), prefill=(PrefillChunk(0, 0, 4, True),)))
    special = rows.of(StepPlan(1, decode=(0,)))
    assert special is not None
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 3] = 2.0, 1.0
    sampled = SampledRows.empty(1, CPU)
    for name in SampledRows.__slots__:
        getattr(sampled, name).zero_()
    sampled.positions.fill_(position)
    sampler = Sampler(place())
    known, made = torch.zeros(1, 9, dtype=torch.int32), Forwarded(logits, [])
    drawn, scores, _ = special.draw(sampler, known, made, sampled, lambda x: x)
    assert (drawn.tolist(), scores) == ([token], None)


def _expected(new: NewRequest, known: list[int], logits: Tensor) -> int:
    """The token of one request by the definition of each option, without any other request."""
    p, num_prompt = new.sampling, len(new.token_ids) - new.num_output_tokens
    changed, output = logits.float().clone(), known[num_prompt:]
    for token, bias in dict(p.logit_bias or ()).items():
        changed[token] += bias
    for token in set(known):
        count = known[num_prompt:].count(token)
        by = p.repetition_penalty
        changed[token] = changed[token] / by if changed[token] > 0 else changed[token] * by
        changed[token] -= count * p.frequency_penalty + (count > 0) * p.presence_penalty
    if len(known) - num_prompt < p.min_tokens:
        changed[list(new.withheld_token_ids)] = float("-inf")
    if p.allowed_token_ids is not None:
        others = set(range(VOCAB_SIZE)).difference(p.allowed_token_ids)
        changed[list(others)] = float("-inf")
    for *before, last in p.bad_words_ids:
        if before == output[max(0, len(output) - len(before)) :][: len(before)]:
            changed[last] = float("-inf")
    for call in p.logits_processors:
        changed = call(known, changed)
    filters = Filters(*torch.tensor([[p.temperature], [p.top_k], [p.top_p], [p.min_p]]))
    least = logit_bounds_reference(changed.unsqueeze(0), filters)
    changed[changed < least] = float("-inf")
    noise = gumbel_noise(keys([new.seed]), torch.tensor([len(known)]), VOCAB_SIZE)[0]
    best = (changed + p.temperature * noise).max(0)
    return int(best.indices) if best.values > float("-inf") else NO_TOKEN


def _random_request(random: Random, slot: int) -> NewRequest:
    """A request that was preempted after some tokens of output, with options that may be none."""
    values: dict[str, Any] = {
        "repetition_penalty": random.uniform(0.6, 1.8),
        "presence_penalty": random.uniform(-2, 2),
        "frequency_penalty": random.uniform(-2, 2),
        "top_k": random.randint(1, 20),
        "top_p": random.uniform(0.3, 1.0),
        "min_p": random.uniform(0.0, 0.3),
        "min_tokens": random.randint(1, 9),
        "logits_processors": [lambda ids, x: x - sum(ids) % 7 * torch.arange(len(x)).cos()],
        "logit_bias": {random.randrange(VOCAB_SIZE): random.uniform(-9, 9) for _ in range(30)},
        "allowed_token_ids": random.sample(range(VOCAB_SIZE), 50),
        "bad_words_ids": [
            random.choices(range(10), k=random.choice((1, 2, 2, 2, 3))) for _ in range(40)
        ],
    }
    options = {
        name: values[name] for name in random.sample(list(values), random.choice((0, 0, 1, 4)))
    }
    token_ids = tuple(random.choices(range(10), k=random.randint(3, 12)))
    params = SamplingParams(temperature=random.choice((0.0, 0.6, 1.3)), max_tokens=20, **options)
    withheld = tuple(random.sample(range(VOCAB_SIZE), 60)) if "min_tokens" in options else ()
    num_output = random.randint(0, len(token_ids) - 1)
    return NewRequest(slot, slot, token_ids, params, random.getrandbits(40), num_output, withheld)


@pytest.mark.parametrize("seed", range(80))
def test_a_row_of_a_mixed_batch_is_drawn_by_the_definition_of_its_own_options(seed: int) -> None:
    """Steps of decodes: up to nine requests, each a few tokens after it was (re)admitted."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    count = random.randint(1, 9)
    news = tuple(_random_request(random, slot) for slot in range(count))
    num_drawn = [random.randint(0, 4) for _ in news]
    known = [
        [*q.token_ids, *random.choices(range(10), k=1 + extra)]
        for q, extra in zip(news, num_drawn, strict=True)
    ]
    chunks = tuple(PrefillChunk(q.slot, 0, len(q.token_ids), True) for q in news)
    rows = _Rows(count)
    # Other requests held the slots before: nothing of theirs may be left.
    before = [_random_request(random, slot) for slot in range(count)]
    plain = [replace(request, sampling=SamplingParams()) for request in before]
    for request in (*before, *plain, *sorted(news, key=lambda q: q.sampling.needs_logits)):
        rows.of(StepPlan(0, (request,), prefill=(chunks[request.slot],)))
    order = random.sample(range(count), count)
    for step in range(4):
        rows.of(StepPlan(1, decode=tuple(slot for slot in order if num_drawn[slot] > step)))
    special = rows.of(StepPlan(1, decode=tuple(order)))
    tokens = torch.full((count, 32), 3, dtype=torch.int32)
    for slot, ids in enumerate(known):
        tokens[slot, : len(ids)] = torch.tensor(ids)
    logits = torch.randn(count, VOCAB_SIZE, generator=generator)
    # So that most tokens to choose from are known ones, which penalties change.
    logits[:, :10] += 2
    sampled = SampledRows(
        rows=torch.arange(count),
        slots=torch.tensor(order),
        positions=torch.tensor([len(known[slot]) for slot in order]),
        temperatures=torch.tensor([news[slot].sampling.temperature for slot in order]),
        seeds=keys([news[slot].seed for slot in order]),
        tokens=torch.zeros(count, dtype=torch.int64),
    )
    sampler = Sampler(place())
    drawn = (
        sampler(logits, sampled)
        if special is None
        else special.draw(sampler, tokens, Forwarded(logits, []), sampled, lambda x: x)[0]
    )
    assert drawn.tolist() == [
        _expected(news[slot], known[slot], logits[row]) for row, slot in enumerate(order)
    ]


def test_decodes_after_a_mixed_step_have_not_the_options_of_an_earlier_request() -> None:
    """A prompt that draws nothing shares a step with a decode, and is gone in the next step."""
    rows, chunk = _Rows(2), PrefillChunk(0, 0, 2, True)
    for request_id, wanted in ((0, 1), (1, 3)):
        new = NewRequest(0, request_id, (1, 2), SamplingParams(logprobs=wanted), 0)
        rows.of(StepPlan(0, (new,), prefill=(chunk,)))
        if request_id == 0:
            rows.of(StepPlan(1, decode=(0,)))
    prompt = NewRequest(1, 2, (1, 2), SamplingParams(max_tokens=0, prompt_logprobs=0), 0)
    for plan in (
        StepPlan(2, (prompt,), prefill=(PrefillChunk(1, 0, 2, False),), decode=(0,)),
        StepPlan(3, decode=(0,)),
    ):
        special = rows.of(plan)
        assert special is not None
        assert special.scored is not None
        assert special.scored.new == [(0, False, 3)]


@pytest.mark.parametrize("other", [10, 300])
def test_penalties_count_the_newest_token_of_an_output_of_any_length(other: int) -> None:
    """Decodes keep a block for several steps, until its table of tokens is too narrow."""
    rows, start = _Rows(2, max_len=1024), 250
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    lengths = (start, other)
    news = tuple(NewRequest(i, i, (1,) * n, params, 0) for i, n in enumerate(lengths))
    chunks = tuple(PrefillChunk(i, 0, n, True) for i, n in enumerate(lengths))
    rows.of(StepPlan(0, news, prefill=chunks))
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 7], logits[:, 3] = 2.0, 1.0
    sampled = SampledRows.empty(2, CPU)
    for name in SampledRows.__slots__:
        getattr(sampled, name).zero_()
    sampled.slots.copy_(torch.arange(2))
    for num_drawn in range(1, 12):
        special = rows.of(StepPlan(num_drawn, decode=(0, 1)))
        assert special is not None
        known = torch.ones(2, 1024, dtype=torch.int32)
        for i, length in enumerate(lengths):
            sampled.positions[i] = length + num_drawn
            known[i, length + num_drawn - 1] = 7
        made = Forwarded(logits, [])
        drawn, _, _ = special.draw(Sampler(place()), known, made, sampled, lambda x: x)
        assert drawn.tolist() == [3, 3]


def test_filters_of_an_earlier_request_do_not_hold_for_a_plain_one() -> None:
    """Not even if no request with options was there when the plain one took the slot."""
    rows, filtered, plain = _Rows(2), SamplingParams(top_k=1), SamplingParams()
    for slot, params in ((0, filtered), (0, plain), (1, filtered)):
        new = NewRequest(slot, slot, (1, 2), params, 0)
        rows.of(StepPlan(0, (new,), prefill=(PrefillChunk(slot, 0, 2, True),)))
    special = rows.of(StepPlan(1, decode=(0, 1)))
    assert special is not None
    assert special.filters is not None
    least = logit_bounds_reference(torch.arange(10.0).repeat(2, 1), special.filters)
    assert least.tolist() == [float("-inf"), 9.0]
