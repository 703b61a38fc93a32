"""What sampling options cost: work follows the tokens there are, and each request's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import engine.step_scores
from engine.changed_rows import BLOCK_ROWS, table_width
from engine.hidden_rows import Forwarded
from engine.sampling_rows import SpecialRows
from engine.step_scores import PROMPT_ROWS, group_of
from engine.types import NewRequest, PrefillChunk, StepPlan
from layers.logits import TokenScores, score
from layers.sampler import Sampler
from layers.step_rows import SampledRows
from llm import LLM, SamplingParams
from tests.checkpoints import random_prompts
from tests.engine.test_sampling_rows import VOCAB_SIZE, _Rows
from tests.layers.tensors import keys, place

MAX_LEN = 5000


class _TableWidths(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The numbers of columns that are gathered from the token table."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.widths: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "index_select" in str(func) and out.dtype == torch.int32 and out.dim() == 2:
            self.widths.append(out.shape[1])
        return out


def _new(slot: int, params: SamplingParams, length: int = 2, **more: Any) -> NewRequest:
    return NewRequest(slot, slot, (1,) * length, params, slot, **more)


def _admitted(*news: NewRequest) -> _Rows:
    rows = _Rows(len(news), max_len=MAX_LEN)
    chunks = tuple(PrefillChunk(q.slot, 0, len(q.token_ids), True) for q in news)
    rows.of(StepPlan(0, news, prefill=chunks))
    return rows


def _drawn(special: SpecialRows, table: Tensor, lengths: list[int], logits: Tensor) -> Any:
    """Draw greedily for requests of `lengths` tokens in slots 0, 1, 2, ..."""
    count = len(lengths)
    sampled = SampledRows(
        rows=torch.arange(count),
        slots=torch.arange(count),
        positions=torch.tensor(lengths),
        temperatures=torch.zeros(count),
        seeds=keys(torch.arange(count)),
        tokens=torch.zeros(count, dtype=torch.int64),
    )
    return special.draw(Sampler(place()), table, Forwarded(logits, []), sampled, lambda x: x)


def _decoded(rows: _Rows, count: int) -> SpecialRows | None:
    return rows.of(StepPlan(1, decode=tuple(range(count))))


def test_penalties_read_as_many_tokens_as_their_longest_row_has() -> None:
    penal, other = SamplingParams(frequency_penalty=1.0), SamplingParams(logit_bias={1: 1.0})
    for params, lengths, expected in (
        ([penal, penal], [10, 30], [256]),
        ([penal, penal], [10, 700], [1024]),
        # The long row has no penalties.
        ([penal, other], [10, 4000], [256]),
        ([other, other], [10, 4000], []),
        # The longest rows are in the last block.
        ([penal] * (BLOCK_ROWS + 1), [4000] + [10] * BLOCK_ROWS, [256, 4096]),
        ([penal], [4500], [MAX_LEN]),
    ):
        news = [_new(i, p, n) for i, (p, n) in enumerate(zip(params, lengths, strict=True))]
        special = _decoded(_admitted(*news), len(news))
        assert special is not None
        table = torch.ones(len(news) + 1, MAX_LEN, dtype=torch.int32)
        with _TableWidths() as watched:
            _drawn(special, table, [n + 1 for n in lengths], torch.zeros(len(news), VOCAB_SIZE))
        assert watched.widths == expected


def test_a_request_that_grows_past_a_width_gets_a_wider_table() -> None:
    """And all its tokens count: the only token of the output stands at the growing end."""
    width = table_width(1)
    rows = _admitted(_new(0, SamplingParams(temperature=0.0, presence_penalty=2.0), width - 3))
    for length in range(width - 2, width + 3):
        special = _decoded(rows, 1)
        assert special is not None
        table = torch.full((2, MAX_LEN), 9, dtype=torch.int32)
        table[0, length - 1] = 3  # the newest token
        logits = torch.zeros(1, VOCAB_SIZE)
        logits[0, 3], logits[0, 5] = 1.5, 1.0
        with _TableWidths() as watched:
            tokens, *_ = _drawn(special, table, [length], logits)
        assert watched.widths == [width if length <= width else 2 * width]
        assert tokens.tolist() == [5]


def test_the_rows_of_a_step_are_found_once_while_nothing_changes() -> None:
    rows = _admitted(_new(0, SamplingParams(presence_penalty=1.0)))
    first = _decoded(rows, 1)
    assert all(_decoded(rows, 1) is first for _ in range(table_width(1) - 3))
    assert _decoded(rows, 1) is not first


def test_a_request_past_min_tokens_has_no_special_rows() -> None:
    """The prompt has 4 tokens. The 3 tokens that must come are at positions 4, 5 and 6."""
    params = SamplingParams(temperature=0.0, min_tokens=3)
    for output in (0, 1):  # the second time after a preemption that kept one token
        new = _new(0, params, 4 + output, num_output_tokens=output, withheld_token_ids=(7,))
        rows = _admitted(new)
        found = [_decoded(rows, 1) for _ in range(4 - output)]
        assert [one is not None for one in found] == [True] * (2 - output) + [False] * 2


def test_a_request_past_min_tokens_keeps_its_other_options_alone() -> None:
    both = SamplingParams(min_tokens=3, top_k=5)
    new = _new(0, both, 4, withheld_token_ids=(7,))
    rows = _admitted(new, _new(1, SamplingParams()))
    found = [_decoded(rows, 2) for _ in range(4)]
    assert [one and (len(one.changed), one.filters is not None) for one in found] == [
        (1, False),
        (1, False),
        (0, True),
        (0, True),
    ]
    penal = SamplingParams(min_tokens=3, presence_penalty=1.0)
    rows = _admitted(_new(0, penal, 4, withheld_token_ids=(7,)))
    blocks = [special.changed for _ in range(4) if (special := _decoded(rows, 1))]
    assert [block.withheld is not None for (block,) in blocks] == [True, True, False, False]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_are_the_same_bits_on_both_sides_of_min_tokens(temperature: float) -> None:
    """A row that withholds nothing that is likely draws what a plain row draws."""
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits[:, 7] = -50
    params = SamplingParams(temperature=temperature, min_tokens=3)
    news = [_new(i, params, 2, withheld_token_ids=(7,)) for i in range(3)]
    rows, sampler = _admitted(*news), Sampler(place(dtype=torch.bfloat16))
    sampled = SampledRows(
        rows=torch.arange(3),
        slots=torch.arange(3),
        positions=torch.full((3,), 3),
        temperatures=torch.full((3,), temperature),
        seeds=keys(torch.arange(3)),
        tokens=torch.zeros(3, dtype=torch.int64),
    )
    special = _decoded(rows, 3)
    assert special is not None
    assert len(special.changed) == 1
    known, made = torch.zeros(4, 9, dtype=torch.int32), Forwarded(logits, [])
    drawn, *_ = special.draw(sampler, known, made, sampled, lambda x: x)
    assert torch.equal(drawn, sampler(logits, sampled))


def test_a_request_that_wants_many_widens_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    work: list[tuple[int, int]] = []

    def counted(
        logits: Tensor, tokens: Tensor, num_top: int, *rows: Tensor, ranked: bool
    ) -> TokenScores:
        work.append((len(tokens), num_top))
        return score(logits, tokens, num_top, *rows, ranked=ranked)

    wanted = [1] * 60 + [90] + [0, 3, 4, 90, 17]
    news = [_new(i, SamplingParams(temperature=0.0, logprobs=n)) for i, n in enumerate(wanted)]
    special = _decoded(_admitted(*news), len(wanted))
    assert special is not None
    logits = torch.randn(len(wanted), VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    table = torch.ones(len(wanted) + 1, 9, dtype=torch.int32)
    monkeypatch.setattr(engine.step_scores, "score", counted)
    tokens, scores, _ = _drawn(special, table, [3] * len(wanted), logits)
    assert sorted(work) == [(1, 17), (2, 4), (2, 90), (61, 1)]
    found, _ = scores.logprobs(len(wanted))
    for i, num_top in enumerate(wanted):
        alone = score(logits[i : i + 1], tokens[i : i + 1], num_top)
        best = dict(zip(alone.top_tokens[0].tolist(), alone.top_values[0].tolist(), strict=True))
        assert found[i] == [{int(tokens[i]): float(alone.values[0]), **best}]


def test_groups_are_few() -> None:
    for ranked in (False, True):
        groups = [group_of(n, ranked=ranked) for n in range(1025)]
        assert sorted(set(groups)) == [(n, ranked) for n in (1, 4, 16, 64, 256, 1024)]
        assert all(most >= n for n, (most, _) in enumerate(groups))


def test_the_logits_of_a_prompt_exist_in_blocks_of_rows(shipped: Path) -> None:
    """Also of two prompts in one step, which want different numbers."""
    lengths, counts = [700, 300, 280], [0, 4, 3]
    params = [
        SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=n)
        for n in counts
    ]
    prompts = random_prompts(lengths, seed=5)
    with LLM(shipped, device="cpu", max_model_len=1024, max_num_batched_tokens=2048) as llm:
        runner: Any = llm.engine.runner
        head, rows = runner._pass.model.head, list[int]()

        def counted(states: Tensor) -> Tensor:
            rows.append(len(states))
            logits: Tensor = head(states)
            return logits

        runner._pass.model.head = counted
        together = llm.generate(prompts, params, use_tqdm=False)
        # The three sampled rows first. Then the group of 0, and that of 3 and 4.
        assert rows == [3, 256, 256, 187, 256, 256, 66]
        assert max(rows) <= PROMPT_ROWS
        for prompt, one, out in zip(prompts, params, together, strict=True):
            (alone,) = llm.generate([prompt], one, use_tqdm=False)
            scores, expected = out["prompt_logprobs"][1:], alone["prompt_logprobs"][1:]
            assert len(scores) == len(prompt) - 1
            for entry, other in zip(scores, expected, strict=True):
                assert entry == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_host_counts_the_tokens_that_the_device_has(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """In chunks and after preemptions, while plain requests come and go."""
    options: dict[str, Any] = {"max_num_batched_tokens": 24, "max_num_seqs": 5}
    options |= {"kvcache_block_size": 16, "num_kvcache_blocks": 12, "max_model_len": 160}
    with LLM(shipped, device="cpu", pipeline_depth=depth, **options) as llm:
        runner: Any = llm.engine.runner
        draw, checked = SpecialRows.draw, list[int]()

        def counted(self: SpecialRows, *about: Any) -> Any:
            sampled: SampledRows = about[3]
            slots = [s for s in sampled.slots.tolist() if s in runner._state.special]
            known = dict(zip(sampled.slots.tolist(), sampled.positions.tolist(), strict=True))
            assert [runner._sampling._num_known[s] for s in slots] == [known[s] for s in slots]
            checked.extend(slots)
            return draw(self, *about)

        monkeypatch.setattr(SpecialRows, "draw", counted)
        kinds: list[dict[str, Any]] = [{}, {"presence_penalty": 1.0}, {"top_k": 5}, {}]
        params = [
            SamplingParams(max_tokens=5 + 7 * i, ignore_eos=True, seed=i, **kinds[i % 4])
            for i in range(9)
        ]
        prompts = random_prompts([3 + 9 * i for i in range(9)], seed=9, vocab_size=4096)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert {out["finish_reason"] for out in outputs} == {"length"}
        assert llm.stats().preemptions > 0
    assert len(checked) > 100


def test_words_of_one_token_stand_beside_longer_ones() -> None:
    """Requests with other lengths of words in one block; the first one has none before the last."""
    words: list[list[list[int]]] = [[[4]], [[1, 1, 5], [2, 5]], [[1, 6]]]
    params = [SamplingParams(temperature=0.0, bad_words_ids=ids) for ids in words]
    news = [NewRequest(i, i, (9, 1), one, 0, 1) for i, one in enumerate(params)]
    special = _decoded(_admitted(*news), 3)
    assert special is not None
    table = torch.tensor([[9, 1, 1]] * 4, dtype=torch.int32)
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[:, 4], logits[:, 5], logits[:, 6] = 3.0, 2.0, 1.0
    logits[1, 5], logits[2, 6] = 4.0, 5.0
    tokens, *_ = _drawn(special, table, [3] * 3, logits)
    assert tokens.tolist() == [5, 4, 4]
