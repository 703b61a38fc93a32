"""A model writing text: python example.py, or python example.py --model path/to/checkpoint.

python example.py --model smollm2 downloads a small chat model, which answers three questions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.smollm2 import NAME, smollm2
from llm import LLM, SamplingParams

SHIPPED = Path(__file__).parent / "assets" / "qwen3-tiny-python"
# The shipped model has only ever seen Python source files.
PYTHON_PROMPTS = [
    "import unittest\n\nclass TestQueue(unittest.TestCase):\n",
    'class Stack:\n    """A last-in, first-out container."""\n\n',
    "import os\nimport sys\n\ndef main():\n",
    "class Reader:\n    def __init__(self, file, encoding='utf-8'):\n",
]
PROMPTS = [
    "The capital of France is",
    "A good cache manager should",
    "def fibonacci(n):\n",
    "Three reasons to write tests first:",
]
QUESTIONS = [
    "What is the capital of France?",
    "What does a compiler do? Answer in one sentence.",
    "Give me three tips for a good night's sleep.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model",
        default=None,
        help=f"checkpoint folder, or {NAME} for the chat model; default: the shipped one",
    )
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=None, help="default: 0.7, chat: 0")
    args = parser.parse_args()
    chat = args.model == NAME
    temperature = (0.0 if chat else 0.7) if args.temperature is None else args.temperature
    params = SamplingParams(temperature=temperature, max_tokens=args.max_tokens)
    if chat:
        print("SmolLM2-135M-Instruct is downloaded (93 MB) and converted at its first use.")
        answer(smollm2(), params)
        return
    prompts = PROMPTS if args.model else PYTHON_PROMPTS
    with LLM(args.model or SHIPPED) as llm:
        outputs = llm.generate(prompts, params)
    for prompt, out in zip(prompts, outputs, strict=True):
        show(prompt, out)


def answer(model: Path, params: SamplingParams) -> None:
    """Ask the questions one after the other, through the model's chat template."""
    with LLM(model) as llm:
        for question in QUESTIONS:
            start = time.perf_counter()
            (out,) = llm.chat([{"role": "user", "content": question}], params, use_tqdm=False)
            show(f"{question}\n", out, f", {time.perf_counter() - start:.2f} s")


def show(prompt: str, out: dict[str, Any], time_taken: str = "") -> None:
    print(f"\n{'-' * 78}\n{prompt}\033[1m{out['text']}\033[0m")
    print(f"[{len(out['token_ids'])} tokens, finish_reason={out['finish_reason']}{time_taken}]")


if __name__ == "__main__":
    main()
