"""What the runner chooses: architecture, attention backend, graphs."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import models.qwen2
import models.qwen3
from config import Config
from engine.compilation import compile_kernels
from engine.model_runner import LocalRunner
from engine.parts import captures_graphs, make_backend, resolve
from engine.sampling_rows import special_bytes
from engine.step_handles import StepOutput
from engine.types import (
    BlockUpdate,
    CacheKind,
    FullPages,
    NewRequest,
    PrefillChunk,
    StepPlan,
    WindowPages,
)
from layers.attention.base import AttentionSpec
from layers.attention.torch_sdpa import TorchAttention
from layers.parallel import ParallelContext
from llm import LLM
from memory.kv_cache import KVCache
from memory.sizing import Usage, fit_blocks
from models import find_architecture
from sampling_params import SamplingParams
from tests.checkpoints import Checkpoints
from tests.engine.waits import PATIENCE
from utils.checkpoint import Checkpoint, open_checkpoint
from utils.errors import ConfigError, EngineClosedError, UnsupportedModelError

SPEC = AttentionSpec(4, 2, 64, 0.125, 16, 128, 4, torch.float32, torch.device("cpu"))


class PickyAttention(TorchAttention):
    """A backend that serves nothing."""

    name = "picky"

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        return f"it dislikes head_dim={spec.head_dim}"


def _config(**options: Any) -> Config:
    return Config(model="x", **{"device": "cpu", "max_num_seqs": 4, **options})


def _checkpoint(model_type: str) -> Checkpoint:
    return Checkpoint(Path("somewhere"), SimpleNamespace(model_type=model_type), frozenset())


@pytest.mark.parametrize(
    ("model_type", "module"), [("qwen2", models.qwen2), ("qwen3", models.qwen3)]
)
def test_an_architecture_is_the_module_of_its_model_type(model_type: str, module: Any) -> None:
    assert find_architecture(_checkpoint(model_type)) is module


@pytest.mark.parametrize("model_type", ["gpt2", "base", "decoder", "", "a.b", "os", "../x", "7b"])
def test_a_model_type_without_a_module_is_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="somewhere is a"):
        find_architecture(_checkpoint(model_type))


def test_a_package_that_a_model_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is there, so that it is not an unknown model."""

    def lacks(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'some_kernels'", name="some_kernels")

    monkeypatch.setattr("models.importlib.import_module", lacks)
    with pytest.raises(ModuleNotFoundError, match="some_kernels"):
        find_architecture(_checkpoint("qwen3"))


def test_auto_takes_a_backend_that_works_here() -> None:
    assert isinstance(make_backend(_config(), SPEC), TorchAttention)


@pytest.mark.parametrize(
    "spec", ["torch", TorchAttention, lambda spec: TorchAttention(spec)], ids=str
)
def test_a_backend_by_name_class_or_factory(spec: Any) -> None:
    assert isinstance(make_backend(_config(attention_backend=spec), SPEC), TorchAttention)


@pytest.mark.parametrize(
    "spec", [PickyAttention, "tests.engine.test_model_runner:PickyAttention"], ids=str
)
def test_a_backend_that_cannot_serve_the_model_says_why(spec: Any) -> None:
    with pytest.raises(ConfigError, match="dislikes head_dim=64") as caught:
        make_backend(_config(attention_backend=spec), SPEC)
    assert caught.value.field == "attention_backend"


def test_what_a_factory_makes_is_checked() -> None:
    for make, problem in (
        (lambda spec: None, "no AttentionBackend"),
        (lambda spec: PickyAttention(spec), "dislikes head_dim=64"),
    ):
        with pytest.raises(ConfigError, match=problem):
            make_backend(_config(attention_backend=make), SPEC)


class NoWindows(TorchAttention):
    """A backend that was written before there were windows."""

    windows = False


def test_windows_need_a_backend_that_has_them(checkpoints: Checkpoints) -> None:
    with pytest.raises(ConfigError, match="no sliding windows"):
        LLM(checkpoints["qwen3-windows"], device="cpu", attention_backend=NoWindows)
    with LLM(
        checkpoints["qwen3-windows"], device="cpu", attention_backend=NoWindows, max_model_len=37
    ) as llm:
        assert llm.engine.config.enable_prefix_caching


@pytest.mark.parametrize(
    ("name", "length", "groups"),
    [
        ("qwen3-windows", 128, [(2, FullPages()), (2, WindowPages(37))]),
        ("qwen3-windows", 38, [(2, FullPages()), (2, WindowPages(37))]),
        # The window is as long as the longest request, so it hides nothing.
        ("qwen3-windows", 37, [(4, FullPages())]),
        ("mistral-window", 128, [(2, WindowPages(20))]),
        ("mistral", 128, [(2, FullPages())]),
    ],
)
def test_layers_with_equal_windows_are_a_cache_group(
    checkpoints: Checkpoints, name: str, length: int, groups: list[tuple[int, CacheKind]]
) -> None:
    with LLM(checkpoints[name], device="cpu", max_model_len=length, max_num_seqs=2) as llm:
        made = llm.engine.runner.kv_groups
        assert [(group.num_layers, group.kind) for group in made] == groups
        assert llm.engine.config.enable_prefix_caching


def test_nothing_is_captured_on_a_cpu() -> None:
    assert not captures_graphs(_config(), TorchAttention(SPEC), torch.float32)


class _FewerBlocks(ParallelContext):
    """One whose peer has room for three blocks."""

    def all_max(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=-3)


def test_the_rank_with_the_fewest_blocks_counts(checkpoints: Checkpoints) -> None:
    """All ranks run the same plans."""
    checkpoint = open_checkpoint(str(checkpoints["qwen2-square"]))
    config = resolve(_config(max_model_len=64, num_kvcache_blocks=8), checkpoint)
    for parallel, count in ((ParallelContext(), 8), (_FewerBlocks(), 3)):
        runner = LocalRunner(config, checkpoint, parallel)
        assert runner.kv_groups[0].num_blocks == count
        runner.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_closed_runner_executes_nothing(checkpoints: Checkpoints, depth: int) -> None:
    checkpoint = open_checkpoint(str(checkpoints["qwen2-square"]))
    runner = LocalRunner(resolve(_config(pipeline_depth=depth), checkpoint), checkpoint)
    assert runner.kv_groups[0].num_blocks > 0
    runner.close()
    runner.close()
    with pytest.raises(EngineClosedError):
        runner.execute(StepPlan(0))


def test_a_step_in_flight_ends_before_its_runner_is_taken_apart(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins = threading.Event()

    class Late(LocalRunner):
        def _run(self, plan: StepPlan) -> StepOutput:
            assert begins.wait(PATIENCE)
            return super()._run(plan)

    checkpoint = open_checkpoint(str(checkpoints["qwen2-square"]))
    runner = Late(resolve(_config(pipeline_depth=1), checkpoint), checkpoint)
    new = NewRequest(0, 0, (5, 6, 7), SamplingParams(temperature=0), 0)
    chunk = PrefillChunk(0, 0, 3, True)
    handle = runner.execute(StepPlan(0, (new,), (BlockUpdate(0, 0, (0,)),), (chunk,)))
    close = runner._launcher.close

    def begin_and_close() -> None:
        begins.set()
        close()

    monkeypatch.setattr(runner._launcher, "close", begin_and_close)
    runner.close()
    assert [len(tokens) for tokens in handle.result().tokens] == [1]


def test_the_cache_leaves_room_for_the_heaviest_steps_and_for_sampling_options(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heaviest prefill has as many of the longest prompts as the token budget allows."""
    checkpoint = open_checkpoint(str(checkpoints["qwen2-square"]))
    config = resolve(_config(max_model_len=33, max_num_batched_tokens=100), checkpoint)
    runner: Any = LocalRunner(config, checkpoint)
    usage = Usage(80 << 30, 40 << 30, weights=1 << 30, peak=5 << 20)

    def measured(
        device: torch.device, free_before: int, steps: list[Callable[[], object]]
    ) -> Usage:
        for step in steps:
            step()
        return replace(usage, free_before=free_before)

    def cache(geometry: Any, dtype: torch.dtype, device: torch.device) -> KVCache:
        return KVCache(geometry, dtype, torch.device("cpu"))

    monkeypatch.setattr("engine.model_runner.measure_usage", measured)
    monkeypatch.setattr("engine.model_runner.KVCache", cache)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    plans: list[StepPlan] = []
    runner._run = plans.append
    runner._device = torch.device("cuda")
    vocab_size, geometry_blocks = 10**7, runner._state.tables.block_tables[0].shape[1]
    with torch.inference_mode():  # as in a runner's start
        (geometry,) = runner._sized(usage.free_before, vocab_size, 64)
    plan, decodes = plans
    assert [(c.start, c.num_tokens, c.samples) for c in plan.prefill] == [(0, 32, True)] * 3
    assert plan.sampled_slots == [0, 1, 2]
    assert [len(new.token_ids) for new in plan.new_requests] == [32] * 3
    # No decodes are captured, so they are measured too, at the last position but one.
    assert decodes.decode == tuple(range(config.max_num_seqs))
    assert {len(update.block_ids) for update in decodes.block_updates} == {geometry_blocks}
    assert runner._state.tables.num_computed[:-1].tolist() == [31] * config.max_num_seqs
    special = special_bytes(config, vocab_size, 64, 4)
    (left,) = fit_blocks(config, (geometry,), replace(usage, peak=usage.peak + special))
    assert geometry.num_blocks == left.num_blocks


def test_all_ranks_run_the_same_steps_as_graphs(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also ranks whose shares of the vocabulary differ: their collectives have to meet."""
    checkpoint = open_checkpoint(str(checkpoints["qwen3-square-tied"]))
    config = replace(resolve(_config(max_model_len=64), checkpoint), tensor_parallel_size=2)
    limits: list[tuple[int, int]] = []

    def graphs(step: object, state: object, max_tokens: int, weights_per_layer: int) -> None:
        limits.append((max_tokens, weights_per_layer))

    monkeypatch.setattr("engine.model_runner.captures_graphs", lambda *args: True)
    monkeypatch.setattr("engine.model_runner.StepGraphs", graphs)
    for rank in range(2):
        LocalRunner(config, checkpoint, ParallelContext(rank, 2)).close()
    assert limits[0] == limits[1]
    assert limits[0][0] == config.max_num_batched_tokens


def test_kernels_are_compiled_on_the_runner_s_device_and_without_the_other_ranks(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of a rehearsal runs in a thread of its own, which begins on device 0."""
    pytest.importorskip("triton")
    # Imported before torch.cuda is patched: its annotations read `torch.cuda.Stream`.
    importlib.import_module("transformers.generation.continuous_batching")
    events: dict[int, list[str]] = {}
    rehearses = threading.Event()

    def note(event: str) -> None:
        events.setdefault(threading.get_ident(), []).append(event)

    def state() -> tuple[bool, bool]:
        return rehearses.is_set(), torch.is_inference_mode_enabled()

    class Rehearsing(ParallelContext):
        @contextmanager
        def rehearsal(self) -> Iterator[None]:
            rehearses.set()
            yield
            rehearses.clear()

    class Graphs:
        def __init__(self, *args: object) -> None: ...

        def rehearsals(self) -> list[Callable[[], object]]:
            return [lambda: note(f"step, {state()}")]

        def capture(self) -> None:
            note(f"capture, {state()}")

    monkeypatch.setattr("engine.model_runner.captures_graphs", lambda *args: True)
    monkeypatch.setattr("engine.model_runner.StepGraphs", Graphs)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: note(f"on {device}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: note("waits"))
    stream = SimpleNamespace(synchronize=lambda: note("end"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    checkpoint = open_checkpoint(str(checkpoints["qwen2-square"]))
    LocalRunner(resolve(_config(), checkpoint), checkpoint, Rehearsing()).close()
    # The threads have streams of their own, which do not wait for what the main stream has to do.
    assert events.pop(threading.get_ident()) == ["waits", "capture, (False, True)"]
    assert [*events.values()] == [["on cpu", "step, (True, True)", "end"]]


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


@pytest.mark.usefixtures("no_device")
def test_steps_run_together_and_an_error_is_raised() -> None:
    here = torch.device("cpu"), ParallelContext()
    both = threading.Barrier(2, timeout=30)
    compile_kernels([both.wait, both.wait], *here)

    def fail() -> None:
        raise ValueError("no such kernel")

    with pytest.raises(ValueError, match="no such kernel"):
        compile_kernels([lambda: None, fail], *here)


@pytest.mark.usefixtures("no_device")
def test_a_kernel_of_two_steps_is_compiled_and_loaded_once() -> None:
    """Also if the second step needs the kernel while the kernel is still compiled."""
    from triton.runtime._async_compile import active_mode

    events: list[str] = []
    asked, launched = threading.Event(), threading.Barrier(2, timeout=30)

    class Kernel:
        @property
        def run(self) -> None:
            events.append("loaded")

    def compiled() -> Kernel:
        assert asked.wait(30)
        events.append("compiled")
        return Kernel()

    def step(second: bool) -> None:
        mode = active_mode.get()
        assert mode is not None
        if second:
            launched.wait()
        kernel = mode.submit("key", compiled, lambda kernel: None)
        if second:
            asked.set()
        else:
            launched.wait()
        kernel.result()
        events.append("launched")

    here = torch.device("cpu"), ParallelContext()
    compile_kernels([partial(step, False), partial(step, True)], *here)
    assert events == ["compiled", "loaded", "launched", "launched"]
    assert active_mode.get() is None
