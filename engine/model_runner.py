"""The runner that executes plans on one local device."""

from __future__ import annotations

import importlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from config import Config
from engine.batch import SlotTables
from engine.types import KVGeometry, ModelRunner, StepHandle, StepPlan, StepResult
from layers.attention.base import AttentionBackend, AttentionSpec
from layers.forward_batch import ForwardBatch
from layers.parallel import ParallelContext
from layers.sampler import sample
from memory.kv_cache import KVCache, kv_blocks
from models.base import CausalLM
from utils.checkpoint import Checkpoint
from utils.errors import ConfigError, EngineClosedError, StepError, UnsupportedModelError
from utils.loader import load_weights
from utils.registry import find_part, parts_in

# Fastest first; the first one that can serve the model on this machine is taken.
_AUTO_BACKENDS = ("triton", "flash_attn", "torch")


class _Handle(StepHandle):
    """A step that runs in a worker thread, or ran already."""

    def __init__(self, step_id: int, tokens: Future[Tensor]) -> None:
        self._step_id = step_id
        self._tokens = tokens

    def result(self) -> StepResult:
        try:
            tokens = self._tokens.result()
        except Exception as error:
            raise StepError(f"step {self._step_id} failed: {error}") from error
        return StepResult(self._step_id, tokens.unsqueeze(1).tolist())


class LocalRunner(ModelRunner):
    """Model, KV cache and per-slot tables on one device.

    With pipeline_depth 0 a step runs inside `execute`; above it, in one worker thread, so that
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
                "this runner drives one device",
                "Use 1.",
            )
        assert config.max_model_len is not None
        self._device = torch.device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        architecture = find_architecture(checkpoint)
        spec = architecture.model_shape(checkpoint.hf_config)
        num_kv_heads = parallel.kv_heads(spec.num_kv_heads)[1]
        attention = AttentionSpec(
            num_heads=parallel.share("query heads", spec.num_heads),
            num_kv_heads=num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.head_dim**-0.5,
            block_size=config.kvcache_block_size,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            dtype=self._dtype,
            device=self._device,
        )
        with torch.inference_mode():
            self._backend = make_backend(config, attention)
            self._model: CausalLM = architecture.MODEL(
                spec,
                checkpoint.hf_config,
                parallel=parallel,
                backend=self._backend,
                max_model_len=config.max_model_len,
                dtype=self._dtype,
                device=self._device,
            )
            load_weights(checkpoint.path, self._model.weight_slots(), tied=spec.tied)
            self._model.finish()
            self._geometry = KVGeometry(
                spec.num_layers,
                num_kv_heads,
                spec.head_dim,
                config.kvcache_block_size,
                num_blocks=0,
                dtype_bytes=self._dtype.itemsize,
            )
            self._geometry = kv_blocks(config, self._geometry)
            self._kv = KVCache(self._geometry, self._dtype, self._device).layers()
            self._tables = SlotTables(
                config.max_num_seqs, config.max_model_len, config.kvcache_block_size, self._device
            )
        self._worker = ThreadPoolExecutor(1, "step") if config.pipeline_depth else None
        self._closed = False

    @property
    def kv_geometry(self) -> KVGeometry:
        return self._geometry

    def execute(self, plan: StepPlan) -> StepHandle:
        if self._closed:
            raise EngineClosedError("execute() after close()")
        if self._worker is not None:
            return _Handle(plan.step_id, self._worker.submit(self._run, plan))
        done: Future[Tensor] = Future()
        try:
            done.set_result(self._run(plan))
        except Exception as error:
            done.set_exception(error)
        return _Handle(plan.step_id, done)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._worker is not None:
            self._worker.shutdown()
        del self._model, self._backend, self._kv, self._tables
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> Tensor:
        inputs = self._tables.stage(plan)
        batch = ForwardBatch(
            input_ids=inputs.input_ids,
            slot_mapping=inputs.slot_mapping,
            rotation=self._model.rotary.prepare(inputs.positions),
            attention=self._backend.prepare(inputs.attention),
            kv=self._kv,
            sampled_rows=inputs.sampled_rows,
        )
        logits = self._model(batch)
        if self._tables.all_greedy(plan):
            tokens = logits.argmax(-1)
        else:
            slots = inputs.sampled_slots
            temperatures, seeds = self._tables.temperatures[slots], self._tables.seeds[slots]
            tokens = sample(logits, temperatures, seeds, inputs.sampled_positions)
        self._tables.write_back(inputs, tokens)
        return tokens


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


def make_backend(config: Config, spec: AttentionSpec) -> AttentionBackend:
    """Construct the attention backend that the config names.

    Raises:
        ConfigError: it does not exist or cannot serve this model on this machine.
    """
    package = "layers.attention"
    if config.attention_backend == "auto":
        known: dict[str, Any] = parts_in(package, AttentionBackend)
        usable = [known[name] for name in _AUTO_BACKENDS if name in known]
        return next(part for part in usable if part.unsupported(spec) is None)(spec)  # type: ignore[no-any-return]
    part = find_part("attention_backend", config.attention_backend, AttentionBackend, package)
    reason = part.unsupported(spec) if isinstance(part, type) else None  # type: ignore[attr-defined]
    if reason is not None:
        raise ConfigError("attention_backend", config.attention_backend, reason, 'Use "auto".')
    return part(spec)  # type: ignore[no-any-return]
