"""What filters and text cost: outputs are checked before anything is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import bench
from benchmarks import variants
from benchmarks.engines import Setting
from benchmarks.reference import Agreement, WrongOutputError
from benchmarks.tokenizer import byte_entries, with_tokenizer
from benchmarks.variants import (
    FILTERS,
    TEXTS,
    VARIANTS,
    filters_workload,
    measure_filters,
    measure_text,
    text_workload,
)
from benchmarks.workloads import Workload, random_workload, seeds_workload
from tests.checkpoints import Checkpoints
from utils.text import Decoder

WORK = replace(random_workload("w", 3, (4, 9), (6, 9), 200), temperature=0.6)


@pytest.fixture
def setting(checkpoints: Checkpoints) -> Setting:
    return Setting(str(checkpoints["qwen3-gqa6"]), "float32", "cpu", 256, threads=1)


@pytest.fixture
def without_words(shipped: Path, tmp_path: Path) -> Setting:
    """The shipped model without its tokenizer."""
    folder = tmp_path / "without"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(shipped / name)
    return Setting(str(folder), "float32", "cpu", 1024, threads=1)


def test_filters_are_timed_in_turn(setting: Setting) -> None:
    found = measure_filters(setting, WORK, repeats=2)
    assert [one.name for one in found.timed] == [variant.name for variant in FILTERS]
    # Greedy, and three filters that leave one token.
    total = 4 * WORK.num_output_tokens
    assert found.agreement == Agreement(total, total)
    assert "3 of 3 all the same" in found.checked
    plain, *others = found.timed
    assert plain.ratios == [1.0, 1.0]
    for one in others:
        assert one.ratios == [
            a / b for a, b in zip(one.step_seconds, plain.step_seconds, strict=True)
        ]
        pairs = zip(one.step_seconds, one.seconds, strict=True)
        assert all(0 < step < whole for step, whole in pairs)


@pytest.mark.parametrize("broken", ["always", "above 1"])
def test_a_filter_that_keeps_too_much_has_no_rate(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr("engine.sampling_rows.logit_bounds", _broken(broken))
    with pytest.raises(WrongOutputError, match="no rate"):
        measure_filters(setting, WORK, repeats=1)


def _broken(broken: str) -> Any:
    """Bounds that keep all, or that keep all where top_k is above 1."""
    from layers.logits import logit_bounds

    def found(logits: Any, filters: Any) -> Any:
        least = logit_bounds(logits, filters)
        narrow = filters.top_k.amax() <= 1
        return least if broken == "above 1" and narrow else least.fill_(float("-inf"))

    return found


def test_text_is_what_the_tokenizer_makes_of_tokens(without_words: Setting) -> None:
    found = measure_text(without_words, WORK, repeats=1)
    assert [one.name for one in found.timed] == [variant.name for variant in TEXTS]
    tokens, text, _ = found.timed
    assert text.ratios == [text.seconds[0] / tokens.seconds[0]]
    assert found.agreement.exact == found.agreement.total > 300


def test_a_wrong_text_has_no_rate(without_words: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    spelled = Decoder(lambda ids: "".join(map(str, ids)))
    monkeypatch.setattr("llm.decoder", lambda tokenizer, **options: spelled)
    with pytest.raises(WrongOutputError, match="not what the tokenizer makes"):
        measure_text(without_words, WORK, repeats=1)


def test_a_stop_string_that_is_found_has_no_rate(
    without_words: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = (*TEXTS[:2], replace(TEXTS[2], params={"stop": list("abcdefghijklmnopqrstuvwxyz")}))
    monkeypatch.setattr(variants, "TEXTS", often)
    with pytest.raises(WrongOutputError, match="wrong lengths with text, a stop string"):
        measure_text(without_words, WORK, repeats=1)


def test_a_vocabulary_is_as_large_as_the_model_and_has_parts_of_characters(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    entries = byte_entries(4000)
    assert len(set(entries)) == len(entries) == 4000
    parts = [entry for entry in entries[256:] if "\ufffd" in entry.decode(errors="replace")]
    assert 20 < len(parts) < 200
    folder = with_tokenizer(checkpoints["qwen3-gqa6"], tmp_path / "made", 4000)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 4000
    tokens = [*range(3990, 4000), entries.index(parts[0]), 300]
    expected = b"".join(entries[token] for token in tokens).decode(errors="replace")
    assert tokenizer.decode(tokens) == expected
    with pytest.raises(ValueError, match="at least 256"):
        byte_entries(255)


def test_workloads_are_small_on_a_cpu() -> None:
    for device, count in (("cpu", 8), ("cuda", 256)):
        work = filters_workload(device, 300)
        assert {len(prompt) for prompt in work.prompts} == {128}
        assert work.lengths == [256] * count
        assert text_workload(device, 151_936) == seeds_workload(count)


def test_from_the_command_line(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(device: str, vocab_size: int) -> Workload:
        assert (device, vocab_size) == ("cpu", 259)
        return WORK

    monkeypatch.setitem(VARIANTS, "filters", (small, measure_filters))
    arguments = ["--workload", "filters", "--repeats", "2", "--model", setting.model]
    monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
    bench.main()
    about, checked, plain, *others = capsys.readouterr().out.splitlines()
    assert "device CPU" in about
    assert "greedy tokens are the reference's own" in checked
    assert plain.startswith("plain ")
    assert len(others) == len(FILTERS) - 1
    assert all("a decode step takes" in line and "times plain (" in line for line in others)
    monkeypatch.setattr("engine.sampling_rows.logit_bounds", _broken("always"))
    with pytest.raises(SystemExit, match="filters: wrong outputs, so no rate"):
        bench.main()
    assert "tok/s" not in capsys.readouterr().out
