"""Which files run between `generate` and the first token of a text prompt, and where a plan goes.

    python -m tests.path [--model folder] [--captured]

The engine has served a request before, so that what happens once is not counted. With --captured
CUDA graphs are on.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from engine.types import StepPlan
from llm import LLM, SamplingParams

ROOT = Path(__file__).parents[1]
# Parts of the repository that are no part of the engine.
_OTHERS = ("tests", "benchmarks", ".venv")


class Calls:
    """The calls into files of the engine, in order.

    Attributes:
        files: every file, in order of its first call.
        plan_files: files of the calls within `execute` that have a plan among their arguments,
            without repetitions in a row.
    """

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.plan_files: list[str] = []
        self._in_execute = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(ROOT):
            return
        name = str(path.relative_to(ROOT))
        if name.startswith(_OTHERS):
            return
        if frame.f_code.co_name == "execute":
            self._in_execute += 1 if event == "call" else -1
        if event == "call":
            self.files.setdefault(name)
            has_plan = any(isinstance(value, StepPlan) for value in frame.f_locals.values())
            if self._in_execute and has_plan and self.plan_files[-1:] != [name]:
                self.plan_files.append(name)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what this thread and new ones call within."""
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    @property
    def returns(self) -> Counter[str]:
        """How often a plan came back to each file that it had left."""
        return Counter({name: n - 1 for name, n in Counter(self.plan_files).items() if n > 1})


def first_token(model: str | Path, **options: Any) -> Calls:
    """The calls of an engine that is ready, from a text prompt to its first token."""
    calls = Calls()
    # Steps run in the thread that is recorded.
    with LLM(model, pipeline_depth=0, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=1)
        llm.generate("def first():", params, use_tqdm=False)
        with calls.recorded():
            llm.generate("def second():", params, use_tqdm=False)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ROOT / "assets" / "qwen3-tiny-python")
    parser.add_argument("--captured", action="store_true", help="with CUDA graphs")
    arguments = parser.parse_args()
    calls = first_token(arguments.model, enforce_eager=not arguments.captured)
    print(f"{len(calls.files)} files run between generate and the first token:")
    print("  " + "\n  ".join(sorted(calls.files)))
    print(f"a plan's way through execute: {' > '.join(calls.plan_files)}")
    print(f"it returns to files that it has left: {dict(calls.returns) or 'never'}")


if __name__ == "__main__":
    main()
