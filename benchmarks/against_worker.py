"""The process of `benchmarks.against`: an engine of the checkout that the first argument names.

This file runs with the modules of that checkout, which may be older than this file, so it imports
`LLM` and `SamplingParams` alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any


def serve(root: str, model: str) -> None:
    os.chdir(root)
    # Instead of the folder of this file, which is on the path because this file is run.
    sys.path[0] = root
    options = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    from llm import LLM, SamplingParams

    llm = LLM(model, **options)
    _answer(seconds=time.perf_counter() - start)
    for line in sys.stdin:
        question = json.loads(line)
        prompts, tokens = question["prompts"], question.get("profile")
        given = question.get("params") or [{"max_tokens": tokens, "ignore_eos": True}] * len(
            prompts
        )
        params = [SamplingParams(**fields) for fields in given]
        if tokens:
            _answer(kernels=_profiled(llm, prompts, params, tokens))
            continue
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        ids = [out["token_ids"] for out in outputs]
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        _answer(seconds=seconds, digest=digest, lengths=list(map(len, ids)))


def _profiled(llm: Any, prompts: Any, params: Any, steps: int) -> list[str]:
    """The kernels of a run, those that take most time first: calls and microseconds a step."""
    from torch.profiler import ProfilerActivity, profile

    llm.generate(prompts, params, use_tqdm=False)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        llm.generate([prompt[::-1] for prompt in prompts], params, use_tqdm=False)
    events: list[Any] = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    lines = []
    for event in events[:15]:
        if event.self_device_time_total:
            calls, micros = event.count / steps, event.self_device_time_total / steps
            lines.append(f"{event.key[:60]:60} {calls:7.1f} x, {micros:7.0f} us")
    return lines


def _answer(**fields: Any) -> None:
    sys.stdout.write("ANSWER " + json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(*sys.argv[1:])
