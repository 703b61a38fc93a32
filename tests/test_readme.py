"""The README's code runs as it stands, on the model that ships."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm import LLM, SamplingParams

ROOT = Path(__file__).parents[1]
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_first_lines(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = CODE[0].replace("path/to/Qwen3-0.6B", str(shipped))
    assert str(shipped) in code
    exec(code, {"__name__": "readme"})
    lines = capsys.readouterr().out
    assert len(re.findall(r"\] (stop|length)\n", lines)) == 2


def test_outputs_streams_and_chats(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(shipped, model)
    # The shipped model is no chat model.
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with LLM(model, device="cpu") as llm:
        names: dict[str, Any] = {"llm": llm, "SamplingParams": SamplingParams}
        exec(CODE[1], names)
        assert llm.stats().finished_requests == 2 + 2 + 1
    assert len(names["out"]["outputs"]) == 2
    assert capsys.readouterr().out


def test_there_is_no_other_code() -> None:
    assert len(CODE) == 2
