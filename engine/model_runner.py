"""The runner that executes plans on one local device."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from config import Config
from engine.batch import SlotTables, StepInputs
from engine.captured_steps import CapturedSteps
from engine.checking.kv_poison import KVPoison
from engine.decode_step import DecodeStep
from engine.extras import Extras, StepExtras, StepLogits, extras_bytes
from engine.launchers import InlineLauncher, Launcher, StepOutput, StreamLauncher, ThreadLauncher
from engine.parts import captures_graphs, make_backend
from engine.prefill_step import PrefillStep
from engine.types import (
    BlockUpdate,
    KVGeometry,
    ModelRunner,
    NewRequest,
    PrefillChunk,
    StepHandle,
    StepPlan,
)
from layers.attention.base import AttentionSpec
from layers.forward_batch import ForwardBatch
from layers.parallel import ParallelContext, Place
from layers.sampler import Sampler
from memory.kv_cache import KVCache, KVLayer, kv_blocks
from memory.sizing import fit_blocks, free_bytes, measure_usage, memory_errors, release_device
from models.base import CausalLM, ModelShape
from sampling_params import SamplingParams
from utils.checkpoint import Checkpoint
from utils.errors import ConfigError, EngineClosedError, UnsupportedModelError
from utils.loader import load_weights


class LocalRunner(ModelRunner):
    """Model, KV cache and per-slot tables on one device.

    On CUDA steps are enqueued on a stream, decodes and short prefills as captured graphs. On a
    CPU a step runs inside `execute` at pipeline_depth 0, above it in one worker thread, so that
    the caller plans the next step meanwhile.

    Args:
        config: resolved (no None or "auto" left that depends on machine or checkpoint).
        checkpoint: the model's folder.
        parallel: this runner's place among ranks; alone by default.

    Raises:
        UnsupportedModelError, WeightsError: see `utils.errors`.
        OutOfMemoryError: weights and KV cache do not fit the device.
    """

    name = "local"

    def __init__(
        self, config: Config, checkpoint: Checkpoint, parallel: ParallelContext | None = None
    ) -> None:
        parallel = parallel or ParallelContext()
        if config.tensor_parallel_size != parallel.size:
            raise ConfigError(
                "tensor_parallel_size",
                config.tensor_parallel_size,
                f"this runner is one of {parallel.size}",
                'Leave model_runner at "local": every rank then gets a runner of its own.',
            )
        assert config.max_model_len is not None
        self._config = config
        self._device = this_device(config)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._closed = False
        self._launcher = self._make_launcher(config)
        self._parallel = parallel
        self._sampler = Sampler(parallel, self._device, self._dtype)
        before = free_bytes(self._device)
        architecture = find_architecture(checkpoint)
        shape = architecture.model_shape(checkpoint.hf_config)
        spec = self._attention_spec(config, shape, parallel)
        with torch.inference_mode(), self._on_device(), memory_errors(self._device):
            self._backend = make_backend(config, spec)
            self._model: CausalLM = architecture.MODEL(
                shape,
                checkpoint.hf_config,
                place=Place(parallel, self._dtype, self._device),
                backend=self._backend,
                max_model_len=config.max_model_len,
            )
            weights = self._model.weight_slots()
            load_weights(checkpoint.path, weights, tied=shape.tied)
            # By the whole tensors: ranks, which may have unequal parts, must choose the same steps.
            total = sum(math.prod(slot.shape) for slot in weights.values())
            self._weights_per_layer = total // (shape.num_layers * parallel.size)
            del weights
            self._model.prepare()
            self._tables = SlotTables(
                config.max_num_seqs, config.max_model_len, config.kvcache_block_size, self._device
            )
            self._extras = Extras(config.max_num_seqs, self._device)
            vocab_size = int(checkpoint.hf_config.vocab_size)
            self._extras_bytes = extras_bytes(
                config.max_num_seqs, vocab_size, self._dtype.itemsize, parallel.size
            )
            self._cache: KVCache | None = None
            self._kv: list[KVLayer] = []
            self._captured: CapturedSteps | None = None
            self._captures = captures_graphs(config, self._backend, self._dtype)
            one_block = KVGeometry(
                num_layers=shape.num_layers,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                block_size=spec.block_size,
                num_blocks=1,
                dtype_bytes=self._dtype.itemsize,
            )
            self._geometry = self._smallest(self._sized(one_block, before))
            self._allocate(self._geometry)
            self._poison = (
                KVPoison(self._kv, self._tables, spec.block_size) if config.kv_sanitizer else None
            )
            if self._captured:
                self._compile(self._captured)
                self._captured.capture(config.max_num_seqs)

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        return (self._geometry,)

    def execute(self, plan: StepPlan) -> StepHandle:
        if self._closed:
            raise EngineClosedError("execute() after close()")
        run = self._run if self._poison is None else partial(self._run_poisoned, self._poison)
        return self._launcher.launch(plan.step_id, lambda: run(plan), timed=plan.timed)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._launcher.close()
        self._captured = self._poison = None
        del self._model, self._backend, self._cache, self._kv, self._tables
        release_device(self._device)

    def _make_launcher(self, config: Config) -> Launcher:
        depth = config.pipeline_depth or 0
        if self._device.type == "cuda":
            return StreamLauncher(self.host_clock, self._device, config.max_num_seqs, depth + 2)
        return ThreadLauncher(self.host_clock) if depth else InlineLauncher(self.host_clock)

    def _on_device(self) -> AbstractContextManager[Any]:
        if isinstance(self._launcher, StreamLauncher):
            return torch.cuda.stream(self._launcher.stream)
        return nullcontext()

    def _attention_spec(
        self, config: Config, shape: ModelShape, parallel: ParallelContext
    ) -> AttentionSpec:
        assert config.max_model_len is not None
        return AttentionSpec(
            num_heads=parallel.per_rank("query heads", shape.num_heads),
            num_kv_heads=parallel.kv_heads(shape.num_kv_heads)[1],
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            block_size=config.kvcache_block_size,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            dtype=self._dtype,
            device=self._device,
        )

    def _allocate(self, geometry: KVGeometry) -> None:
        self._cache = KVCache(geometry, self._dtype, self._device)
        self._kv = self._cache.layers()
        if self._captures:
            parts = self._model, self._backend, self._sampler, self._tables, self._kv
            self._captured = CapturedSteps(
                DecodeStep(*parts, geometry.block_size),
                PrefillStep(*parts, self._config.max_num_batched_tokens),
                self._weights_per_layer,
            )

    def _sized(self, one_block: KVGeometry, free_before: int) -> KVGeometry:
        """The geometry with the number of blocks that the config asks for or memory allows."""
        config = self._config
        explicit = config.num_kvcache_blocks or config.kvcache_memory_bytes
        if self._device.type != "cuda" or explicit:
            return kv_blocks(config, one_block)
        self._allocate(replace(one_block, num_blocks=self._tables.block_tables.shape[1]))
        if self._captured:
            self._compile(self._captured)
        usage = measure_usage(self._device, free_before, self._heaviest_steps())
        self._cache, self._kv, self._captured = None, [], None
        torch.cuda.empty_cache()
        usage = replace(usage, peak=usage.peak + self._extras_bytes)
        return fit_blocks(config.gpu_memory_utilization, one_block, usage)

    def _smallest(self, geometry: KVGeometry) -> KVGeometry:
        """The geometry with the blocks of the rank that has the fewest."""
        count = torch.tensor([-geometry.num_blocks], device=self._device)
        return replace(geometry, num_blocks=-int(self._parallel.all_max(count)))

    def _compile(self, captured: CapturedSteps) -> None:
        """Run steps that need different kernels side by side, so that these compile in parallel.

        All are padding, which reads the same and writes nothing that counts.
        """
        steps = captured.rehearsals(self._config.max_num_seqs)

        def run(step: Callable[[], object]) -> None:
            # A thread begins on device 0.
            torch.cuda.set_device(self._device)
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.inference_mode(), torch.cuda.stream(stream):
                step()
                stream.synchronize()

        torch.cuda.synchronize(self._device)
        # A rehearsal, since ranks would have to meet in the same collectives in the same order.
        with self._parallel.rehearsal(), ThreadPoolExecutor(len(steps), "compile") as threads:
            list(threads.map(run, steps))

    def _heaviest_steps(self) -> list[Callable[[], object]]:
        """The steps that need the most memory: the largest prefill and the largest decode."""
        config = self._config
        assert config.max_model_len is not None
        longest = min(config.max_model_len - 1, config.max_num_batched_tokens)
        count = min(config.max_num_seqs, max(1, config.max_num_batched_tokens // longest))
        table = tuple(range(self._tables.block_tables.shape[1]))
        params = SamplingParams()
        prefill = StepPlan(
            step_id=0,
            new_requests=tuple(
                NewRequest(slot, slot, (0,) * longest, params, 0) for slot in range(count)
            ),
            block_updates=tuple(BlockUpdate(slot, 0, table) for slot in range(count)),
            prefill=tuple(PrefillChunk(slot, 0, longest, True) for slot in range(count)),
        )
        return [lambda: self._run(prefill), *(self._captured.heaviest() if self._captured else ())]

    @torch.inference_mode()
    def _run_poisoned(self, poison: KVPoison, plan: StepPlan) -> StepOutput:
        poison.fill(plan)
        output = self._run(plan)
        poison.check(plan)
        return output

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepOutput:
        assert self._cache is not None
        for copy in plan.block_copies:
            self._cache.copy_block(copy.source, copy.target)
        extras = self._extras.of(plan)
        return StepOutput(self._run_plain(plan)) if extras is None else self._run_with(extras, plan)

    def _run_plain(self, plan: StepPlan) -> Tensor:
        if self._captured and self._captured.serves(plan):
            return self._captured.run(plan)
        tables = self._tables
        inputs = tables.stage(plan)
        logits = self._forward(inputs)
        if tables.all_greedy(plan):
            tokens = self._sampler.greedy(logits)
        else:
            slots = inputs.sampled_slots
            temperatures, seeds = tables.temperatures[slots], tables.seeds[slots]
            tokens = self._sampler(logits, temperatures, seeds, inputs.sampled_positions)
        tables.write_back(inputs, tokens)
        return tokens

    def _run_with(self, extras: StepExtras, plan: StepPlan) -> StepOutput:
        """A step some of whose tokens are drawn from changed logits, or scored."""
        if self._captured and not extras.prompts and self._captured.serves(plan):
            step = self._captured.run_to_logits(plan)
        else:
            step = self._to_logits(plan, extras.prompt_rows)
        return StepOutput(*extras.draw(self._sampler, self._tables.tokens, step))

    def _to_logits(self, plan: StepPlan, prompt_rows: Tensor) -> StepLogits:
        """Run a plan up to the logits of its new tokens, then of `prompt_rows`."""
        tables = self._tables
        inputs = tables.stage(plan)
        if inputs.sampled_rows is not None:
            wanted = torch.cat((inputs.sampled_rows, prompt_rows))
            inputs = replace(inputs, sampled_rows=wanted)
        slots, positions = inputs.sampled_slots, inputs.sampled_positions
        return StepLogits(
            logits=self._forward(inputs),
            slots=slots,
            keys=(tables.temperatures[slots], tables.seeds[slots], positions),
            store=partial(tables.write_back, inputs),
        )

    def _forward(self, inputs: StepInputs) -> Tensor:
        batch = ForwardBatch(
            input_ids=inputs.input_ids,
            slot_mapping=inputs.slot_mapping,
            rotation=self._model.rotary.prepare(inputs.positions),
            attention=self._backend.prepare(inputs.attention),
            kv=self._kv,
            sampled_rows=inputs.sampled_rows,
        )
        return self._model(batch)


def this_device(config: Config) -> torch.device:
    """The CPU, or the current CUDA device by its number."""
    if config.device != "cuda":
        return torch.device(config.device)
    return torch.device("cuda", torch.cuda.current_device())


def find_architecture(checkpoint: Checkpoint) -> ModuleType:
    """The module of `models` for the checkpoint's model_type.

    Raises:
        UnsupportedModelError: there is none.
    """
    model_type = str(checkpoint.hf_config.model_type)
    name = f"models.{model_type.replace('-', '_')}"
    if model_type.replace("-", "_").isidentifier():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
        else:
            if hasattr(module, "MODEL"):
                return module
    raise UnsupportedModelError(
        f"{checkpoint.path} is a {model_type!r} model and there is no {name} module for it. "
        "See CONTRIBUTING.md for how to add one."
    )
