"""The whole engine over processes, with models."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from config import Config
from engine.parts import resolve
from engine.ranks.runner import TensorParallelRunner
from engine.types import StepPlan
from llm import LLM, SamplingParams
from tests.checkpoints import Checkpoints, random_prompts
from tests.engine.fake_ranks import rank_pids
from tests.engine.waits import no_wait_runs_out
from utils.checkpoint import open_checkpoint
from utils.errors import ConfigError, RequestError, StepError, WorkerDiedError

PROMPTS = random_prompts([20, 3, 37, 9], seed=31)
PARAMS = [
    SamplingParams(temperature=temperature, max_tokens=12, ignore_eos=True, seed=i)
    for i, temperature in enumerate([0.0, 0.0, 0.8, 1.5])
]


class _Counting:
    """A logits processor with a state: the token that it favours depends on the number of calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        self.num_calls += 1
        logits[self.num_calls] += 3.0
        return logits


class _InOneProcess:
    """A processor that pickle can send, but that can be made only in the process `pid`."""

    def __init__(self, pid: int) -> None:
        if pid != os.getpid():
            raise ModuleNotFoundError("No module named 'late'")
        self.pid = pid

    def __reduce__(self) -> Any:
        return _InOneProcess, (self.pid,)

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        return logits


def _exits(token_ids: list[int], logits: Tensor) -> Tensor:
    raise SystemExit(3)


class _ForRequest:
    """An object that makes processors; `local` ones cannot be pickled."""

    def __init__(self, *, local: bool) -> None:
        self.local = local

    def for_request(self, prompt_token_ids: list[int], sample: int) -> Any:
        return (lambda ids, logits: logits) if self.local else _Counting()


_WANTED: list[dict[str, Any]] = [
    {"temperature": 0.9, "top_k": 30, "top_p": 0.8, "logit_bias": {7: 2.5}},
    {
        "temperature": 0,
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.5,
        "allowed_token_ids": list(range(3, 90)),
    },
    {"min_p": 0.1, "min_tokens": 4, "stop_token_ids": list(range(200)), "bad_words_ids": [[250]]},
    {
        "logits_processors": [_ForRequest(local=False)],
        "logprobs": 30,
        "prompt_logprobs": 2,
        "prompt_logprobs_start": 3,
    },
]
SPECIAL = [
    SamplingParams(max_tokens=40, ignore_eos=True, seed=i, **values)
    for i, values in enumerate(_WANTED)
]
# Few blocks, so that requests are thrown out and recomputed.
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 7,
}


def _tokens(llm: LLM) -> list[list[int]]:
    return [out["token_ids"] for out in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def _run_on(llm: LLM) -> None:
    while True:
        llm.step()


def _of_main(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A logits processor as a script of the user's own defines it."""

    def unchanged(token_ids: list[int], logits: Any) -> Any:
        return logits

    unchanged.__module__, unchanged.__qualname__ = "__main__", "unchanged"
    monkeypatch.setattr(sys.modules["__main__"], "unchanged", unchanged, raising=False)
    pickle.dumps(unchanged)
    return unchanged


@pytest.mark.parametrize(
    ("name", "size", "depth"),
    [
        ("qwen3-gqa4-bias-tied", 2, 1),
        ("qwen2-gqa2-wide-heads-tied", 2, 0),
        pytest.param("qwen3-gqa4-bias-tied", 4, 1, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_one_process(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str, size: int, depth: int
) -> None:
    path = checkpoints[name]
    with LLM(path, **OPTIONS) as llm:
        expected = _tokens(llm)
        special = llm.generate(PROMPTS, SPECIAL, use_tqdm=False)
    with LLM(path, tensor_parallel_size=size, pipeline_depth=depth, **OPTIONS) as llm:
        assert _tokens(llm) == expected
        assert _tokens(llm) == expected
        outputs = llm.generate(PROMPTS, SPECIAL, use_tqdm=False)
        # None can be had in another process, though the second can be pickled.
        for processor in (lambda ids, x: x, _of_main(monkeypatch), _ForRequest(local=True)):
            with pytest.raises(RequestError, match="the ranks cannot be sent it"):
                llm.generate([[1]], SamplingParams(logits_processors=[processor]))
        lost = SamplingParams(logits_processors=[_InOneProcess(os.getpid())], max_tokens=3)
        failed, good = llm.generate(PROMPTS[:2], [lost, SPECIAL[1]], use_tqdm=False)
        assert "a rank did not get the processor: ModuleNotFoundError" in str(failed["error"])
        assert good["token_ids"] == outputs[1]["token_ids"]
        ends = SamplingParams(logits_processors=[_exits], max_tokens=3)
        failed, good = llm.generate(PROMPTS[:2], [ends, SPECIAL[1]], use_tqdm=False)
        assert "SystemExit" in str(failed["error"])
        assert good["token_ids"] == outputs[1]["token_ids"]
        assert _tokens(llm) == expected
    assert outputs[3]["metrics"]["preemptions"] > 0  # its processor is not made anew
    assert [out["token_ids"] for out in outputs] == [out["token_ids"] for out in special]
    for kind in ("logprobs", "prompt_logprobs"):
        for ours, theirs in zip(outputs[3][kind], special[3][kind], strict=True):
            assert ours == (theirs if theirs is None else pytest.approx(theirs, abs=1e-4))


def test_an_engine_whose_rank_is_killed_can_be_closed_and_built_again(
    checkpoints: Checkpoints,
) -> None:
    """Two engines at once, of which one loses a rank in the middle of its collectives."""
    path = checkpoints["qwen3-square-tied"]
    options = {**OPTIONS, "num_kvcache_blocks": 32, "tensor_parallel_size": 2, "pipeline_depth": 1}
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    with LLM(path, **options) as other:
        expected = _tokens(other)
        pids = rank_pids()
        llm = LLM(path, **options)
        llm.add_request(PROMPTS[0], long)
        for _ in range(30):
            llm.step()
        os.kill(rank_pids(others=pids)[1], signal.SIGKILL)
        with no_wait_runs_out(), pytest.raises(WorkerDiedError, match=r"rank 1 .*SIGKILL"):
            _run_on(llm)
        with pytest.raises(WorkerDiedError, match="construct a new one"):
            _tokens(llm)
        llm.close()
        assert _tokens(other) == expected
    with LLM(path, **options) as again:
        assert _tokens(again) == expected


def test_what_a_rank_cannot_load_is_the_error_of_one_process(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in checkpoints["qwen3-square-tied"].iterdir():
        (folder / file.name).write_bytes(
            file.read_bytes()[: 10_000 if "safe" in file.name else None]
        )
    with pytest.raises(Exception, match="not a readable safetensors file") as one:
        LLM(folder, **OPTIONS)
    with pytest.raises(type(one.value), match="not a readable safetensors file"):
        LLM(folder, tensor_parallel_size=2, **OPTIONS)


@pytest.mark.parametrize(("name", "problem"), [("qwen2-gqa6", "6 query heads")])
def test_heads_that_do_not_divide_are_refused_before_a_process_is_started(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    def starts(*args: object, **options: object) -> None:
        raise AssertionError("a process is started")

    monkeypatch.setattr("subprocess.Popen", starts)
    with pytest.raises(ConfigError, match=problem) as caught:
        LLM(checkpoints[name], tensor_parallel_size=4, **OPTIONS)
    assert caught.value.field == "tensor_parallel_size"


def test_a_step_that_fails_on_the_ranks_is_a_step_error(checkpoints: Checkpoints) -> None:
    path = str(checkpoints["qwen3-square-tied"])
    checkpoint = open_checkpoint(path)
    config = resolve(Config(model=path, tensor_parallel_size=2, **OPTIONS), checkpoint)
    with closing(TensorParallelRunner(config, checkpoint)) as runner:
        handle = runner.execute(StepPlan(0, decode=(99,)))
        with pytest.raises(StepError, match=r"step 0 failed: .*index") as caught:
            handle.result()
        assert "layers/step_rows.py" in str(caught.value.__cause__)


def _listening(pid: int) -> list[str]:
    """Local addresses, in the kernel's notation, at which a process takes TCP connections."""
    links = Path(f"/proc/{pid}/fd")
    sockets = {os.readlink(links / name) for name in os.listdir(links) if (links / name).exists()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.append(fields[1].split(":")[0])
    return found


def test_ranks_meet_on_this_machine_alone_and_one_rank_meets_nobody(
    checkpoints: Checkpoints,
) -> None:
    path = checkpoints["qwen3-square-tied"]
    before = _listening(os.getpid())
    with LLM(path, tensor_parallel_size=2, **OPTIONS) as llm:
        places = [place for pid in rank_pids() for place in _listening(pid)]
        assert set(places) == {"0100007F"}  # 127.0.0.1
        assert _listening(os.getpid()) == before
    with LLM(path, **OPTIONS) as llm:
        _tokens(llm)
        assert _listening(os.getpid()) == before
        assert not torch.distributed.is_initialized()
