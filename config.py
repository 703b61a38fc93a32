"""The one place where the engine's options live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, did_you_mean
from utils.rules import Rule, boolean, check_rules, choice, integer, ruled, rules_of, share

# A part is named, imported by "package.module:Class", or given as a class or factory.
PartSpec = str | type | Callable[..., Any]

# Sets of options by name; docs/presets.md says why, and what each was measured to do.
PRESETS: dict[str, dict[str, Any]] = {
    # A long prompt holds up the running requests by a step of at most 2,048 tokens.
    "low_latency": {"max_num_batched_tokens": 2048, "max_num_seqs": 128},
    "throughput": {
        "gpu_memory_utilization": 0.95,
        "max_num_batched_tokens": 32768,
        "max_num_seqs": 1024,
    },
    # Small blocks, as half of the last one of every request lies idle.
    "small_memory": {
        "gpu_memory_utilization": 0.7,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 64,
        "kvcache_block_size": 64,
    },
}

_PART = Rule(
    lambda v: callable(v) or (isinstance(v, str) and v != ""),
    "is neither a name nor something to construct",
    'Give a registered name, "package.module:Class", a class or a factory.',
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one engine; frozen. None and "auto" are filled in by `engine.parts.resolve`.

    Attributes:
        model: checkpoint folder, or a hub name already in (or fetchable to) the local hub cache.
        dtype: of weights, activations and KV cache. "auto": the checkpoint's own on CUDA,
            float32 on CPU.
        device: "auto" takes CUDA when there is a usable device.
        max_model_len: context window in tokens, prompt and output together. None: 4096, or the
            checkpoint's own limit if that is smaller.
        max_num_seqs: most requests running at once.
        max_num_batched_tokens: most positions computed in one step, drafted ones included.
        gpu_memory_utilization: share of the device memory that the engine takes (CUDA only).
        kvcache_block_size: tokens per KV block, a multiple of 16.
        num_kvcache_blocks, kvcache_memory_bytes: size of the KV cache of one device, in blocks or
            bytes. Neither: on CUDA what gpu_memory_utilization leaves, on a CPU enough for
            max_num_seqs full contexts, at most 1 GiB.
        enable_cuda_graphs: capture decodes and short prefills. None: wherever possible.
        enforce_eager: never capture.
        enable_prefix_caching: share KV blocks between equal prefixes. None: on, unless the block
            manager cannot.
        eviction_policy: which cached block is given up first: "lru" the least recently used,
            "lfu" the least often found, "cost" the cheapest to compute again.
        tensor_parallel_size: devices that share one model, 1 to 8; each has a process of its own.
        attention_backend: "auto" takes the fastest that works here.
        num_speculative_tokens: most positions that a decode row computes beyond its one. The runner
            drafts their tokens and keeps those that it would have sampled; the output is the same.
            Only the runners "fake" and "simulated" draft today; others refuse it.
        pipeline_depth: 0 plans a step after the previous one ended; 1 plans it while the
            previous one runs. None: 1 on CUDA, 0 on CPU. The tokens are the same.
        seed: base of the noise of requests without a seed of their own.
        kv_sanitizer: check every use of a KV block and poison dead ones with NaN; slow.
        scheduler, model_runner: "continuous" or "static"; "local", or "fake" and "simulated"
            without a device.
        block_manager: "auto" is "prefix", or "paged" with enable_prefix_caching=False.
        queue_policy, admission_policy, preemption_policy, step_policy: who runs next, how many run
            at once, who gives up its blocks, what a step computes first (docs/scheduling.md).

    Raises:
        ConfigError: an option is out of range or contradicts another.
    """

    model: str
    dtype: str = ruled("auto", choice("auto", "float32", "bfloat16", "float16"))
    device: str = ruled("auto", choice("auto", "cpu", "cuda"))
    max_model_len: int | None = ruled(None, integer(2, optional=True))
    max_num_seqs: int = ruled(512, integer(1))
    max_num_batched_tokens: int = ruled(16384, integer(1))
    gpu_memory_utilization: float = ruled(0.9, share("Use e.g. 0.9."))
    kvcache_block_size: int = ruled(256, integer(16))
    num_kvcache_blocks: int | None = ruled(None, integer(1, optional=True))
    kvcache_memory_bytes: int | None = ruled(None, integer(1, optional=True))
    enable_cuda_graphs: bool | None = ruled(None, boolean(optional=True))
    enforce_eager: bool = ruled(False, boolean())
    enable_prefix_caching: bool | None = ruled(None, boolean(optional=True))
    eviction_policy: PartSpec = ruled("lru", _PART)
    tensor_parallel_size: int = ruled(1, integer(1, 8, "One host has 8 devices at most."))
    attention_backend: PartSpec = ruled("auto", _PART)
    num_speculative_tokens: int = ruled(0, integer(0))
    pipeline_depth: int | None = ruled(None, integer(0, 1, "Use 1 to overlap.", optional=True))
    seed: int = ruled(0, integer(0))
    kv_sanitizer: bool = ruled(False, boolean())
    scheduler: PartSpec = ruled("continuous", _PART)
    block_manager: PartSpec = ruled("auto", _PART)
    model_runner: PartSpec = ruled("local", _PART)
    queue_policy: PartSpec = ruled("fcfs", _PART)
    admission_policy: PartSpec = ruled("optimistic", _PART)
    preemption_policy: PartSpec = ruled("latest", _PART)
    step_policy: PartSpec = ruled("decode_first", _PART)

    @staticmethod
    def from_options(model: str | Path, preset: str | None = None, **options: Any) -> Config:
        """Config from keyword options, which override those of a preset.

        Raises:
            ConfigError: there is no such option or preset; with a suggestion.
        """
        if preset is not None and preset not in list(PRESETS):
            fix = did_you_mean(str(preset), PRESETS)
            raise ConfigError("preset", preset, "unknown preset", fix)
        options = PRESETS.get(preset or "", {}) | options
        known = {f.name for f in fields(Config)}
        for name, value in options.items():
            if name not in known:
                raise ConfigError(name, value, "unknown option", did_you_mean(name, known))
        return Config(model=str(model), **options)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model", self.model, "is empty", "Give a checkpoint folder.")
        check_rules(self, _RULES, ConfigError)
        size, budget = self.kvcache_block_size, self.max_num_batched_tokens
        if size % 16:
            fix = f"Use {size + -size % 16}."
            raise ConfigError("kvcache_block_size", size, "must be a multiple of 16", fix)
        if budget < self.max_num_seqs:
            problem = f"is below max_num_seqs={self.max_num_seqs}: a decode step would not fit"
            fix = f"Use {self.max_num_seqs} or more, or lower max_num_seqs."
            raise ConfigError("max_num_batched_tokens", budget, problem, fix)
        for one, other in _EITHER:
            value, contradiction = getattr(self, one), getattr(self, other)
            if value and contradiction:
                problem = f"contradicts {other}={contradiction!r}"
                raise ConfigError(one, value, problem, "Give one of the two.")


_RULES = rules_of(Config)
# Options that contradict each other if both are given.
_EITHER = (
    ("enforce_eager", "enable_cuda_graphs"),
    ("num_kvcache_blocks", "kvcache_memory_bytes"),
)
