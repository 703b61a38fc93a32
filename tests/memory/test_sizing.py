"""What happens when memory runs out, without a device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm import LLM
from memory.sizing import memory_errors
from utils.errors import OutOfMemoryError

CPU = torch.device("cpu")


def test_what_torch_raises_when_memory_runs_out_names_the_ways_out() -> None:
    with pytest.raises(OutOfMemoryError, match="Lower max_num_batched_tokens"), memory_errors(CPU):
        torch.empty(2**60)
    with pytest.raises(OutOfMemoryError), memory_errors(CPU):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="size"), memory_errors(CPU):
        torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="illegal"), memory_errors(CPU):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    ours = OutOfMemoryError("one of ours")
    with pytest.raises(OutOfMemoryError, match="one of ours"), memory_errors(CPU):
        raise ours


def test_weights_that_do_not_fit(shipped: Path, tmp_path: Path) -> None:
    shutil.copytree(shipped, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 2**50}))
    with pytest.raises(OutOfMemoryError):
        LLM(tmp_path, device="cpu")


def test_tables_that_do_not_fit(shipped: Path) -> None:
    sizes = {"max_num_seqs": 10**12, "max_num_batched_tokens": 10**12, "num_kvcache_blocks": 8}
    with pytest.raises(OutOfMemoryError, match="max_num_seqs"):
        LLM(shipped, device="cpu", **sizes)
