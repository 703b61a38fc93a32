"""The code of README and pages runs on the model that ships; links lead to files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm import LLM, SamplingParams

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def run(code: str, model: Path, **names: Any) -> dict[str, Any]:
    """Execute a page's code, with the model that ships in place of the path that it names."""
    exec(code.replace("path/to/Qwen3-0.6B", str(model)), names)
    return names


def test_the_first_lines(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = code_of("README.md")[0]
    assert "path/to/Qwen3-0.6B" in code
    run(code, shipped)
    lines = capsys.readouterr().out
    assert len(re.findall(r"\] (stop|length)\n", lines)) == 2


def test_a_part_of_your_own(shipped: Path) -> None:
    """The code itself asserts which request waited longer; in the default order it fails."""
    code = code_of("README.md")[1]
    assert run(code, shipped)["llm"].config.queue_policy.__name__ == "LongestFirst"
    with pytest.raises(AssertionError):
        run(code.replace("queue_policy=LongestFirst, ", ""), shipped)


@pytest.fixture
def chat_model(shipped: Path, tmp_path: Path) -> Path:
    """The shipped model, which is no chat model, with a chat template."""
    model = tmp_path / "model"
    shutil.copytree(shipped, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return model


@pytest.fixture
def llm(chat_model: Path) -> Iterator[LLM]:
    with LLM(chat_model, device="cpu") as llm:
        yield llm


def test_outputs_streams_and_chats(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(code_of("docs/options.md")[:2]).replace('LLM("path/to/Qwen3-0.6B")', "llm")
    names = run(code, Path(), llm=llm)
    assert llm.stats().finished_requests == 2 + 2 + 1
    assert len(names["out"]["outputs"]) == 2
    assert capsys.readouterr().out


def test_the_loop_by_hand(llm: LLM) -> None:
    names = run(code_of("docs/options.md")[2], Path(), llm=llm, SamplingParams=SamplingParams)
    assert len(names["outputs"]) == 1


def test_hidden_states(llm: LLM) -> None:
    names = run(code_of("docs/options.md")[3], Path(), llm=llm, SamplingParams=SamplingParams)
    assert names["out"].hidden_states.shape[1] == 256


def test_the_logits_processor(llm: LLM) -> None:
    code = code_of("docs/options.md")[4].replace("llm.generate", "outputs = llm.generate")
    names = run(code, Path(), llm=llm, SamplingParams=SamplingParams)
    (out,) = names["outputs"]
    assert out["error"] is None
    assert len(set(out["token_ids"])) == len(out["token_ids"]) > 1


def test_calls_of_other_engines(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = code_of("docs/migrating.md")
    run(code, Path(), llm=llm, SamplingParams=SamplingParams)
    assert len(capsys.readouterr().out.splitlines()) == 3 * 4


@pytest.mark.parametrize("depth", [0, 1])
def test_structured_outputs(shipped: Path, depth: int) -> None:
    check_structured_outputs(shipped, device="cpu", pipeline_depth=depth)


def check_structured_outputs(model: Path, **options: Any) -> None:
    """Run the examples of docs/structured-output.md; every output follows its grammar."""
    schema, *others = code_of("docs/structured-output.md")
    names = run(schema.replace('-0.6B")', '-0.6B", **options)'), model, options=options)
    llm, person, people, sums = names["llm"], names["person"], [names["out"]], []
    with llm:
        for code in others:
            made = run(code, model, llm=llm, person=person, SamplingParams=SamplingParams)
            both = [made["json_of_person"], made["sums"]]
            values: dict[str, Any] = {"seed": 0, "n": 3, "temperature": 1.5, "max_tokens": 200}
            again = [SamplingParams(logits_processors=[one], **values) for one in both]
            found = llm.generate(["x = ", "1+"], again, use_tqdm=False)
            people += [made["outputs"][0], *found[0]["outputs"]]
            sums += [made["outputs"][1], *found[1]["outputs"]]
        assert llm.stats().unfinished_requests == 0
    assert (len(people), len(sums)) == (9, 8)
    for out in people:
        value = json.loads(out["text"])
        assert value.keys() == {"name", "age"}
        assert len(value["name"]) <= 12
        assert 0 <= value["age"] <= 130
    assert all(re.fullmatch(r"\d{1,4}(\+\d{1,4}){1,3}\n", out["text"]) for out in sums)
    assert {(out["finish_reason"], out["error"]) for out in people + sums} == {("stop", None)}


# In the order in which README.md and the pages are read. What docs/exact.md asserts needs a GPU.
SCRIPT = (
    *("README.md", "docs/options.md", "docs/migrating.md", "docs/life-of-a-request.md"),
    *("docs/structured-output.md", "docs/caching.md", "docs/scheduling.md"),
    "docs/testing-your-part.md",
)


def test_all_pages_are_one_script(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever types one snippet after another never needs a name that was not there yet."""
    for package in ("llguidance", "xgrammar"):
        pytest.importorskip(package)
    names = run("\n".join(code for page in SCRIPT for code in code_of(page)), chat_model)
    names["llm"].close()
    assert names["driver"].plans


def test_there_is_no_other_code() -> None:
    pages = "README.md", "docs/options.md", "docs/structured-output.md", "docs/exact.md"
    assert [len(code_of(page)) for page in (*pages, "docs/migrating.md")] == [2, 5, 3, 1, 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    here = [target.partition("#")[0] for target in targets if not target.startswith("http")]
    assert [target for target in here if target and not (page.parent / target).exists()] == []


def test_the_readme_is_short_and_names_its_test_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    # .ci/run runs the command that the README states.
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^make test\b", text, re.M)


def test_the_log_has_dated_headings_newest_first() -> None:
    text = (ROOT / "docs" / "LOG.md").read_text()
    headings = re.findall(r"^## (.*)", text, re.M)
    dates = [re.match(r"\d{4}-\d\d-\d\d ", heading) for heading in headings]
    assert [heading for heading, date in zip(headings, dates, strict=True) if not date] == []
    days = [date[0] for date in dates if date]
    assert days == sorted(days, reverse=True)
    assert len(set(headings)) == len(headings)
