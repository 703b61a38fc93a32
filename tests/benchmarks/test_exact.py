"""The workload `exact` on a CPU, and that it finds a single changed bit."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from benchmarks import command, exact_settings
from benchmarks.engines import Setting
from benchmarks.exact import Answer, Kept, answers_of, compare, promise
from benchmarks.exact_processors import HashLogits, break_logits, hash_of, hashes_of
from benchmarks.exact_quality import Quality, measure_quality, teacher_forced, teacher_prompts
from benchmarks.exact_settings import Company, Request, Requests
from benchmarks.reference import Reference
from engine.step_scores import PROMPT_ROWS
from llm import LLM, SamplingParams
from tests.checkpoints import MAX_POSITION, Checkpoints
from tests.engine.fake_ranks import rank_pids


@pytest.fixture
def setting(checkpoints: Checkpoints) -> Setting:
    return Setting(str(checkpoints["qwen3-gqa6"]), "float32", "cpu", MAX_POSITION)


@pytest.fixture
def requests(setting: Setting) -> list[Request]:
    return Requests(setting).requests(8)


def test_all_of_it_on_the_shipped_model(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "out.json"
    arguments = ["--workload", "exact", "--requests", "3", "--tokens", "300", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
    bench.main()
    out = capsys.readouterr().out
    assert "on a CPU the engine promises equal tokens, not bits" in out
    figures = json.loads(file.read_text())["exact"]["1"]
    assert figures["promised"] == "tokens"
    rows = {row["setting"]: Kept(**row) for row in figures["settings"]}
    assert len(rows) == 14
    for row in rows.values():
        assert (row.num_requests, row.num_scored, row.tokens, row.problem) == (3, 1, 3, ""), row
        assert f"{row.setting:<36}     3/3" in out
    # Alone, a request has the same rows twice, so that also a CPU gives it the same bits.
    assert (rows["alone again"].bits, rows["alone again"].logprobs) == (3, 1)
    assert rows["preempted"].note != ""
    assert rows["beside logits of NaN"].note == "2 others ended by an error"
    quality = Quality(**figures["quality"])
    assert quality.num_tokens >= 300
    assert 0 <= quality.kl < 1e-9 < quality.kl_16bit < 1e-2
    # It was trained on source code like that of the engine.
    assert quality.nll_float32 < math.log(4096) / 2


def _answer(*, logprobs: bool = True) -> Answer:
    found = [[(5, (-0.5).hex()), (6, (-1.5).hex())]] if logprobs else None
    return Answer([5], [5], found, ("9 123\n",))


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, (4, 2, 4, 4)),
        ({"tokens": [6]}, (3, 2, 4, 3)),
        ({"hashed_tokens": [6]}, (3, 2, 4, 3)),
        (
            {"logprobs": [[(5, math.nextafter(-0.5, 0).hex()), (6, (-1.5).hex())]]},
            (4, 1, 4, 3),
        ),
        ({"logprobs": [[(5, (-0.5).hex()), (7, (-1.5).hex())]]}, (4, 1, 4, 3)),
        ({"logits": ("9 124\n",)}, (4, 2, 3, 3)),
        # A rank that has other logits than the first.
        ({"logits": ("9 123\n", "9 124\n")}, (4, 2, 3, 3)),
    ],
)
def test_a_changed_bit_is_a_lost_request(
    changed: dict[str, Any], kept: tuple[int, int, int, int]
) -> None:
    alone = [_answer(), _answer(logprobs=False), _answer(), _answer(logprobs=False)]
    found = compare("some", alone, [*alone[:2], replace(alone[2], **changed), alone[3]])
    assert (found.num_requests, found.num_scored) == (4, 2)
    assert (found.tokens, found.logprobs, found.logits, found.bits) == kept
    lost = 4 - kept[3]
    assert found.failure("bits") == (f"some: {lost} of 4 lost bits" if lost else None)
    lost = 4 - kept[0]
    assert found.failure("tokens") == (f"some: {lost} of 4 lost tokens" if lost else None)


def test_bits_are_promised_on_cuda_alone() -> None:
    assert (promise("cuda"), promise("cpu")) == ("bits", "tokens")


def test_a_request_that_another_run_draws_otherwise_is_lost_everywhere() -> None:
    alone = [replace(_answer(), hashed_tokens=[6])]
    assert compare("some", alone, alone).tokens == 0


def test_hashes_are_of_bits() -> None:
    row = torch.randn(49_155)
    assert hash_of(row) == hash_of(row.clone())
    for value in (torch.nextafter(row[7], torch.tensor(9.0)), -row[7]):
        changed = row.clone()
        changed[7] = value
        assert hash_of(changed) != hash_of(row)
    assert hash_of(row.flip(0)) != hash_of(row)
    assert hash_of(torch.tensor([0.0, 1.0])) != hash_of(torch.tensor([-0.0, 1.0]))


def test_the_hash_changes_nothing_and_tells_ranks_apart(tmp_path: Path) -> None:
    row = torch.randn(10)
    before = row.clone()
    hasher = HashLogits(str(tmp_path), 3)
    assert hasher([1, 2], row) is row
    hasher([1, 2, 3], row)
    assert torch.equal(row, before)
    (text,) = hashes_of(str(tmp_path), 3)
    assert text == f"2 {hash_of(row)}\n3 {hash_of(row)}\n"
    (tmp_path / "3-1").write_text(text)
    assert hashes_of(str(tmp_path), 3) == (text,)
    (tmp_path / "3-2").write_text("2 1\n3 1\n")
    assert len(hashes_of(str(tmp_path), 3)) == 2
    assert hashes_of(str(tmp_path), 30) == ()


def test_an_engine_that_changes_one_bit_in_a_batch_is_found(
    setting: Setting, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs in a batch are in truth runs alone, so that all other bits are equal."""
    generate, victim = exact_settings._generate, requests[5]

    def served(llm: LLM, several: Any) -> list[dict[str, Any]]:
        outputs = [generate(llm, [one])[0] for one in several]
        if len(several) > 1:
            place = [one.index for one in several].index(victim.index)
            (token, value), *rest = outputs[place]["logprobs"][-1].items()
            outputs[place]["logprobs"][-1] = {token: math.nextafter(value, 0), **dict(rest)}
        return outputs

    monkeypatch.setattr(exact_settings, "_generate", served)
    with LLM(setting.model, device="cpu") as llm:
        alone, _ = answers_of(llm, Company("alone", one_by_one=True), requests)
        found, _ = answers_of(llm, Company("batch"), requests)
    kept = compare("batch", alone, found)
    assert (kept.tokens, kept.logprobs, kept.logits, kept.bits) == (8, kept.num_scored - 1, 8, 7)
    assert kept.num_scored == 2


def test_requests_are_of_all_kinds(requests: list[Request]) -> None:
    params = [one.params for one in requests]
    assert sum(one.temperature == 0 for one in params) == 4
    assert all(one.seed is not None for one in params if one.temperature)
    assert sum(one.logprobs is not None for one in params) == 2
    assert sum(one.needs_logits for one in params) == 4
    lengths = sorted(len(one.prompt) for one in requests)
    assert lengths[0] == 16
    assert 256 < lengths[-1] <= MAX_POSITION - 32


def test_outputs_are_those_of_their_requests(setting: Setting, requests: list[Request]) -> None:
    """Requests run shuffled among the others."""
    prompts = [one.prompt for one in requests]
    others = Requests(setting).others(5, {"temperature": 0})
    with LLM(setting.model, device="cpu", model_runner="fake") as llm:
        own, found = Company("some", others).serve(llm, requests)
    assert [out["prompt_token_ids"] for out in own] == prompts
    assert [out["prompt_token_ids"] for out in found] == [one.prompt for one in others]


@pytest.mark.parametrize("count", [2, 8, 64])
def test_requests_are_preempted(setting: Setting, count: int) -> None:
    make = Requests(setting)
    requests = make.requests(count)
    options, company = exact_settings._preempting(make, requests)
    with LLM(setting.model, device="cpu", model_runner="fake", **options) as llm:
        note, problem = company.shows(*company.serve(llm, requests))
    assert int(note.split()[0]) > 0
    assert problem == ""


def test_a_setting_that_tests_nothing_fails(setting: Setting, requests: list[Request]) -> None:
    with LLM(setting.model, device="cpu", model_runner="fake") as llm:
        own, others = Company("batch").serve(llm, requests)
    for shows in (exact_settings._preemptions, exact_settings._hits):
        note, problem = shows(own, others)
        kept = compare("some", [_answer()], [_answer()], (note, problem))
        assert kept.bits == 1
        for promised in ("bits", "tokens"):
            assert kept.failure(promised) == f"some: {problem}"
    assert "1 of the others" in exact_settings._no_errors([], [{"error": ValueError()}])[1]


def test_lost_requests_end_the_run_with_their_settings(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Kept("good", 4, 2, tokens=4, logprobs=1, logits=0, bits=0)
    bad = [replace(good, setting="bad", tokens=3), replace(good, setting="idle", problem="idled")]
    far = Quality("bfloat16", 10, 1.2, 1.0, nll=2.0, nll_16bit=2.0, nll_float32=2.0, error=0.0)
    monkeypatch.setattr("benchmarks.run.measure_exact", lambda *_: iter([good, *bad]))
    monkeypatch.setattr("benchmarks.run.measure_quality", lambda *_: far)
    arguments = ["bench.py", "--workload", "exact", "--model", setting.model]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as error:
        bench.main()
    _, *lines = str(error.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [
        "bad",
        "idle",
        "KL to float32 is 1.2, and transformers' 1",
    ]
    assert "bad" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        ({}, 0),
        ({"kl": 1.09e-4}, 0),
        ({"kl": 1.11e-4}, 1),
        ({"kl": math.nan}, 1),
        ({"nll": 2.0109}, 0),
        ({"nll": 1.9891}, 0),
        ({"nll": 2.0111}, 1),
        ({"nll": math.nan}, 1),
        ({"nll": 2.0111, "error": 0.006}, 0),
        ({"nll": 2.0121, "error": 0.006}, 1),
    ],
)
def test_what_is_too_far_from_float32(changed: dict[str, float], count: int) -> None:
    near = Quality("bfloat16", 9, 1e-4, 1e-4, nll=2.0, nll_16bit=2.01, nll_float32=2.0, error=0.0)
    assert len(replace(near, **changed).failures()) == count  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2])
def test_teacher_forced_logits_are_those_after_each_token(setting: Setting, ranks: int) -> None:
    """Of one rank, and of two, whose logits are gathered; logits come in blocks of rows."""
    setting = replace(setting, options={"tensor_parallel_size": ranks})
    assert MAX_POSITION > PROMPT_ROWS + 100
    prompts = teacher_prompts(setting, 900)
    assert {len(prompt) for prompt in prompts} == {MAX_POSITION - 1}
    assert len(prompts) == 2
    model = Reference(setting).model
    with teacher_forced(setting) as logits_of:
        for prompt in prompts:
            found = logits_of(prompt)
            with torch.inference_mode():
                expected = model(torch.tensor([prompt])).logits[0, :-1]
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_wrong_logits_are_far_from_float32(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure_quality(setting, 100).failures() == []
    load = Reference._load

    def other(self: Reference, dtype: str) -> Any:
        model = load(self, dtype)
        # transformers of 16 bits stays near to that of float32; the engine is far from both.
        model.get_output_embeddings().weight.data *= 1.5
        return model

    monkeypatch.setattr(Reference, "_load", other)
    assert len(measure_quality(setting, 100).failures()) == 2


def test_a_broken_neighbour_fails_alone(setting: Setting) -> None:
    params = [
        SamplingParams(max_tokens=2, logits_processors=[break_logits]),
        SamplingParams(max_tokens=2, ignore_eos=True),
    ]
    with LLM(setting.model, device="cpu") as llm:
        broken, other = llm.generate([[1, 2], [3, 4]], params, use_tqdm=False)
    assert broken["error"] is not None
    assert other["error"] is None


@dataclass(frozen=True)
class LateHashes(HashLogits):
    """Hashes that the process `late` takes long for."""

    late: int

    def __call__(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if os.getpid() == self.late:
            time.sleep(0.3)
        return super().__call__(token_ids, logits)


@pytest.mark.slow
def test_the_hashes_of_all_ranks_are_awaited(
    monkeypatch: pytest.MonkeyPatch, setting: Setting
) -> None:
    request = Requests(setting).request(0, 20, 2, temperature=0)
    with LLM(setting.model, device="cpu", tensor_parallel_size=2) as llm:
        # An output is there when rank 0 has ended.
        hashes = partial(LateHashes, late=rank_pids()[1])
        monkeypatch.setattr(exact_settings, "HashLogits", hashes)
        [answer], _ = answers_of(llm, Company("alone", one_by_one=True), [request])
    assert [len(text.splitlines()) for text in answer.logits] == [2]


@pytest.mark.slow
def test_in_two_ranks(setting: Setting) -> None:
    """Hashes and logits come from the processes of the ranks."""
    two = replace(setting, options={"tensor_parallel_size": 2})
    requests = Requests(setting).requests(2)
    with LLM(setting.model, device="cpu", **two.options) as llm:
        alone, _ = answers_of(llm, Company("alone", one_by_one=True), requests)
        again, _ = answers_of(llm, Company("alone", one_by_one=True), requests)
    assert compare("again", alone, again).bits == 2
    for one, answer in zip(requests, alone, strict=True):
        (text,) = answer.logits
        assert len(text.splitlines()) == one.params.max_tokens
    assert measure_quality(two, 100).failures() == []


def test_ranks_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    measured = []
    monkeypatch.setattr(command, "run_exact", lambda setting, *_: measured.append(setting.options))
    arguments = ["--workload", "exact", "--tensor-parallel", "1", "2", "--model", setting.model]
    monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
    bench.main()
    assert measured == [{"tensor_parallel_size": 1}, {"tensor_parallel_size": 2}]
