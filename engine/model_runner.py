"""The model runner that executes the scheduler's step plans on one local device.

In this file a row of a step is one input token. In `engine.types` a row is all work of a step for
one request. The R sampled rows of a step are the rows whose next token is drawn.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import Config
from engine.checking.kv_sanitizer import KVPoison
from engine.compilation import compile_kernels
from engine.device_state import DeviceState, Staging
from engine.graphs import StepGraphs
from engine.hidden_rows import Forwarded
from engine.parts import captures_graphs, make_backend
from engine.sampling_rows import SamplingRows, SpecialRows, special_bytes
from engine.step_handles import HostLauncher, StepOutput, StreamLauncher
from engine.types import Clock, KVGeometry, ModelRunner, StepHandle, StepPlan
from layers.attention.base import AttentionBackend, AttentionSpec
from layers.parallel import ParallelContext, Place
from layers.sampler import Sampler
from layers.step_rows import SampledRows, SlotTables, StepRows
from memory.kv_cache import KVCache, KVLayer
from memory.sizing import (
    cache_groups,
    fit_blocks,
    free_bytes,
    heaviest_steps,
    kv_blocks,
    measure_usage,
    memory_errors,
    release_device,
)
from models import find_architecture
from models.base import CausalLM, ForwardBatch, ModelShape
from utils.checkpoint import Checkpoint
from utils.errors import ConfigError, EngineClosedError
from utils.loader import load_weights


@dataclass(slots=True)
class StepPass:
    """Enqueues the work of a step: computes logits, draws the new tokens and stores the tokens.

    A runner refers to its `StepGraphs`, which refers to this object. If this object also referred
    to the runner, the memory of a dropped runner would stay until Python collects reference cycles.
    """

    model: CausalLM
    backend: AttentionBackend
    sampler: Sampler
    state: DeviceState
    kv: list[KVLayer]
    windows: tuple[int | None, ...]  # of each cache group

    def forward(
        self, rows: StepRows, special: SpecialRows | None = None, out: Tensor | None = None
    ) -> Forwarded:
        """Compute logits and states of the R sampled rows, and what `special` needs besides.

        Args:
            out: tensor in the model's dtype. The model may write the logits to `out` and return it.
        """
        # None means the logits of all rows. Without prefill chunks all rows are sampled rows.
        wanted = rows.sampled.rows if rows.num_chunks else None
        more = special.prompt_rows if special else ()
        if more:
            wanted = torch.cat((rows.sampled.rows, *more))
        groups = zip(self.state.tables.block_tables, self.windows, strict=True)
        batch = ForwardBatch(
            input_ids=rows.input_ids,
            slot_mapping=rows.slot_mapping,
            rotations=self.model.rotary.prepare(rows.positions),
            attention=tuple(self.backend.prepare(rows.attention(*group)) for group in groups),
            kv=self.kv,
            sampled_rows=wanted,
            logits=out,
            inputs=dict.fromkeys(special.layers) if special else {},
        )
        if not more:
            logits, states = self.model(batch)
            return Forwarded(logits, [states], (), batch.inputs)
        # `draw` computes logits of prompt rows block by block: all of them would take much memory.
        counts = [len(rows.sampled.rows), *map(len, more)]
        states, *prompts = torch.split(self.model.states(batch), counts)
        return Forwarded(self.model.head(states), [states], prompts, batch.inputs)

    def draw(
        self,
        made: Forwarded,
        sampled: SampledRows,
        special: SpecialRows | None = None,
        greedy: bool = False,
    ) -> StepOutput:
        """Draw a token for each sampled row, and write the tokens into the device's token table.

        Args:
            made: the result of `forward`.
            sampled: the R sampled rows. The drawn tokens are also written to `sampled.tokens`.
            special: sampling options besides temperature and seed; None if no sampled row has any.
            greedy: whether every sampled row has temperature 0.
        """
        if special and special.draws:
            tokens = self.state.tables.tokens
            output = StepOutput(*special.draw(self.sampler, tokens, made, sampled, self.model.head))
        elif greedy:
            output = StepOutput(self.sampler.greedy(made.logits))
        else:
            output = StepOutput(self.sampler(made.logits, sampled))
        self.state.write(sampled, output.tokens)
        return output

    def plain(self, rows: StepRows, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Enqueue a step with no sampling options but temperature and seed.

        Returns the logits and states of its sampled rows.
        """
        self.state.fill(rows)
        made = self.forward(rows, out=out)
        self.draw(made, rows.sampled)
        return made.logits, made.states[0]


class LocalRunner(ModelRunner):
    """Holds the model, the KV cache and the tables of the running requests on one device.

    On a GPU, `execute` enqueues the step on a CUDA stream. Decodes and short prefills run as CUDA
    graphs if the config and the attention backend allow graphs. On a CPU `execute` runs the step
    itself if pipeline_depth is 0. If pipeline_depth is 1, a worker thread runs the step.

    Args:
        config: config that `engine.parts.resolve` returned.
        parallel: this runner's rank and its collectives; by default there is a single rank.

    Raises:
        ConfigError: `config` asks for something that the model or the machine does not support.
        UnsupportedModelError, WeightsError: the model is not supported, or its weights are faulty.
        OutOfMemoryError: weights and KV cache do not fit into the device's memory.
    """

    name = "local"

    def __init__(
        self, config: Config, checkpoint: Checkpoint, parallel: ParallelContext | None = None
    ) -> None:
        parallel = parallel or ParallelContext()
        if config.tensor_parallel_size != parallel.size:
            problem = f"this runner is one of {parallel.size}"
            fix = 'Leave model_runner at "local": every rank then gets a runner of its own.'
            raise ConfigError("tensor_parallel_size", config.tensor_parallel_size, problem, fix)
        self._config = config
        self._parallel = parallel
        self._device = torch.device(config.device)
        if config.device == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._closed = False
        self._graphs: StepGraphs | None = None
        self._poison: KVPoison | None = None
        self._launcher = step_launcher(config, self.now, self._device)
        self._launcher.state.run(lambda: self._start(checkpoint))

    @property
    def kv_groups(self) -> tuple[KVGeometry, ...]:
        return self._groups

    def execute(self, plan: StepPlan) -> StepHandle:
        if self._closed:
            raise EngineClosedError("execute() after close()")
        return self._launcher.launch(plan, lambda: self._run(plan))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._launcher.close()
        self._graphs = self._poison = None
        del self._model, self._backend, self._caches, self._pass, self._state
        release_device(self._device)

    def _run(self, plan: StepPlan) -> StepOutput:
        if self._poison:
            self._poison.fill(plan)
        for copy in plan.block_copies:
            self._caches[copy.group].copy_block(copy.source, copy.target)
        with self._staging.group():
            self._state.apply(plan)
            special = self._sampling.of(plan) if self._state.special else None
            captured = not (special and (special.prompt_rows or special.layers))
            if self._graphs and captured and self._graphs.serves(plan):
                made, sampled = self._graphs.replay(plan)
                output = StepOutput(sampled.tokens)
                if special and special.draws:
                    # The graphs ignored the options in `special`, so all tokens are drawn anew.
                    output = self._pass.draw(made, sampled, special)
            else:
                rows = self._state.rows(plan)
                made = self._pass.forward(rows, special)
                greedy = self._state.all_greedy(plan)
                output = self._pass.draw(made, rows.sampled, special, greedy)
            if special and special.hidden:
                hidden = special.hidden.states(made, self._model.normed)
                output = replace(output, hidden=hidden)
        if self._poison:
            self._poison.check(plan)
        return output

    def _start(self, checkpoint: Checkpoint) -> None:
        """Load the model, allocate the device's memory, and capture CUDA graphs."""
        config = self._config
        self._staging = Staging(self._device)
        before = free_bytes(self._device)
        stream = getattr(self._launcher, "stream", None)
        here = torch.cuda.stream(stream) if stream else nullcontext()
        with here, memory_errors(self._device):
            spec = self._load(checkpoint)
            vocab_size = int(checkpoint.hf_config.vocab_size)
            self._sampler = Sampler(Place(self._parallel, self._dtype, self._device), vocab_size)
            limits = config.max_num_seqs, spec.max_model_len, spec.block_size
            tables = SlotTables.zeros(*limits, self._device, len(self._groups))
            self._state = DeviceState(tables, self._staging)
            slots = self._state.special, config.max_num_seqs
            self._sampling = SamplingRows(*slots, self._staging, vocab_size, self.hidden_layers)
            groups = self._sized(before, vocab_size, int(checkpoint.hf_config.hidden_size))
            # All ranks get the same block ids, so all ranks use the smallest of their block counts.
            blocks = torch.tensor([-group.num_blocks for group in groups], device=self._device)
            self._allocate((-self._parallel.all_max(blocks)).tolist())
            if config.kv_sanitizer:
                layers = [cache.layers() for cache in self._caches]
                self._poison = KVPoison(layers, self._layer_groups[-1], self._state.tables)
            if self._graphs:
                self._graphs.capture()

    def _load(self, checkpoint: Checkpoint) -> AttentionSpec:
        config, parallel = self._config, self._parallel
        architecture = find_architecture(checkpoint)
        shape: ModelShape = architecture.model_shape(checkpoint.hf_config)
        assert config.max_model_len is not None
        # A window as long as the longest request hides nothing.
        hiding = (w if w and w < config.max_model_len else None for w in shape.windows)
        shape = replace(shape, windows=tuple(hiding))
        spec = AttentionSpec(
            num_heads=parallel.per_rank("query heads", shape.num_heads),
            num_kv_heads=parallel.kv_heads(shape.num_kv_heads)[1],
            head_dim=shape.head_dim,
            scale=shape.attention_scale,
            block_size=config.kvcache_block_size,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            dtype=self._dtype,
            device=self._device,
            windowed=any(shape.windows),
        )
        self._backend = make_backend(config, spec)
        self._captures = captures_graphs(config, self._backend, self._dtype)
        self._model: CausalLM = architecture.MODEL(
            shape,
            checkpoint.hf_config,
            place=Place(parallel, self._dtype, self._device),
            backend=self._backend,
            max_model_len=config.max_model_len,
        )
        weights = self._model.weight_targets()
        load_weights(checkpoint.path, weights, tied=shape.tied)
        # From this number `StepGraphs` decides which steps run as graphs. All ranks must decide
        # alike, so `slot.shape` is the shape of the whole weight, not of this rank's slice.
        total = sum(math.prod(slot.shape) for slot in weights.values())
        self._weights_per_layer = total // (shape.num_layers * parallel.size)
        del weights
        self._model.prepare()
        measured = type(self) is LocalRunner and self._backend.exact and self._model.exact
        self.exact = type(self).exact or measured
        self._windows, self._layer_groups = shape.group_windows, shape.layer_groups
        self.hidden_layers = shape.num_layers
        sizes = spec.num_kv_heads, spec.head_dim, spec.block_size, self._dtype.itemsize
        self._groups = cache_groups(self._layer_groups, self._windows, *sizes)
        return spec

    def _allocate(self, num_blocks: list[int]) -> None:
        """Allocate `num_blocks` blocks for each cache group."""
        sized = zip(self._groups, num_blocks, strict=True)
        self._groups = tuple(replace(group, num_blocks=count) for group, count in sized)
        self._caches = [KVCache(group, self._dtype, self._device) for group in self._groups]
        layers = [iter(cache.layers()) for cache in self._caches]
        kv = [next(layers[group]) for group in self._layer_groups]
        parts = self._model, self._backend, self._sampler, self._state
        self._pass = StepPass(*parts, kv, self._windows)
        if self._captures:
            limits = self._config.max_num_batched_tokens, self._weights_per_layer
            self._graphs = StepGraphs(self._pass.plain, self._state, *limits)

    def _sized(self, free_before: int, vocab_size: int, hidden_size: int) -> tuple[KVGeometry, ...]:
        """Return the cache groups. The config or the free memory sets their block counts."""
        config, tables = self._config, self._state.tables.block_tables
        given = config.num_kvcache_blocks or config.kvcache_memory_bytes
        if (measures := self._device.type == "cuda" and not given) or self._captures:
            self._allocate([tables[0].shape[1]] * len(tables))
        if self._graphs:
            compile_kernels(self._graphs.rehearsals(), self._device, self._parallel)
        if not measures:
            return kv_blocks(config, self._groups)
        about = config, self._groups, self._state.tables.num_computed
        steps = heaviest_steps(self._run, *about, self._graphs.heaviest() if self._graphs else [])
        usage = measure_usage(self._device, free_before, steps)
        self._graphs = None
        del self._caches, self._pass
        torch.cuda.empty_cache()
        special = special_bytes(config, vocab_size, hidden_size, self._dtype.itemsize)
        usage = replace(usage, peak=usage.peak + special)
        return fit_blocks(config, self._groups, usage)


def step_launcher(
    config: Config, clock: Clock, device: torch.device
) -> HostLauncher | StreamLauncher:
    """Return a launcher for `device`. When a step ends, the launcher reads the time of `clock`."""
    depth = config.pipeline_depth or 0
    if device.type == "cuda":
        # A launched step needs a result buffer until the result is read. Rank 0 has at most
        # pipeline_depth + 1 launched steps. Slower ranks may have one step more than rank 0, since
        # the next plan is sent to all ranks as soon as rank 0 has ended a step.
        return StreamLauncher(clock, device, config.max_num_seqs, depth + 2)
    return HostLauncher(clock, in_thread=depth > 0)
