"""A model writing text: python example.py, or python example.py --model path/to/checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="checkpoint folder; default: the shipped one")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()
    prompts = PROMPTS if args.model else PYTHON_PROMPTS
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    with LLM(args.model or SHIPPED) as llm:
        outputs = llm.generate(prompts, params)
    for prompt, out in zip(prompts, outputs, strict=True):
        print(f"\n{'-' * 78}\n{prompt}\033[1m{out['text']}\033[0m")
        print(f"[{len(out['token_ids'])} tokens, finish_reason={out['finish_reason']}]")


if __name__ == "__main__":
    main()
