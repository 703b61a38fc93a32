"""The one place where the engine's options live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, did_you_mean

# A part is named, imported by "package.module:Class", or given as a class or factory.
PartSpec = str | type | Callable[..., Any]

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEVICES = ("auto", "cpu", "cuda")
_OPTIONAL_BOOLS = ("enable_cuda_graphs", "enable_prefix_caching")
_PARTS = (
    "scheduler",
    "block_manager",
    "eviction_policy",
    "model_runner",
    "attention_backend",
    "queue_policy",
    "admission_policy",
    "preemption_policy",
    "step_policy",
)
_MAX_RANKS = 8

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


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one engine; frozen. None and "auto" are filled in by `engine.parts.resolve`.

    Attributes:
        model: checkpoint folder, or a hub name already in (or fetchable to) the local hub cache.
        dtype: of weights, activations and KV cache. "auto": the checkpoint's own on CUDA,
            float32 on CPU (where half precision is rarely faster and never more exact).
        device: "auto" takes CUDA when there is a usable device.
        max_model_len: context window in tokens, prompt and output together. None: 4096, or the
            checkpoint's own limit if that is smaller.
        max_num_seqs: most requests running at once.
        max_num_batched_tokens: most positions computed in one step, drafted ones included; longer
            prompts take several steps.
        gpu_memory_utilization: share of the device memory that weights, activations, graphs
            and KV cache may take together (CUDA only).
        kvcache_block_size: tokens per KV block, a multiple of 16.
        num_kvcache_blocks: KV blocks; None derives them from kvcache_memory_bytes or, on CUDA,
            from gpu_memory_utilization.
        kvcache_memory_bytes: bytes for the KV cache of one device, instead of
            num_kvcache_blocks. If neither is given on a CPU: enough for max_num_seqs full
            contexts, at most 1 GiB.
        enable_cuda_graphs: replay captured graphs for decodes and short prefills. None: wherever
            possible.
        enforce_eager: never capture graphs.
        enable_prefix_caching: share KV blocks between equal prefixes. None: on, unless the block
            manager cannot.
        eviction_policy: which cached block is given up first: "lru" the least recently used,
            "lfu" the least often found, "cost" the cheapest to compute again; or as for
            attention_backend.
        tensor_parallel_size: devices that share one model, 1 to 8; each has a process of its own.
        attention_backend: name, "package.module:Class", class or factory; "auto" takes the
            fastest that works here.
        num_speculative_tokens: most positions that a decode row computes beyond its one. The runner
            drafts their tokens and keeps those that it would have sampled; the output is the same.
            Other runners refuse it: only "fake" and "simulated" draft today.
        pipeline_depth: 0 plans a step after the previous one ended; 1 plans it while the
            previous one runs. None: 1 on CUDA, 0 on CPU. The tokens are the same.
        seed: base of the noise of requests without a seed of their own.
        kv_sanitizer: check every use of a KV block and poison dead ones with NaN; for finding
            mistakes, at the cost of waiting for the device after every step.
        scheduler, block_manager, model_runner: the parts, as for attention_backend. Schedulers are
            "continuous" and "static"; runners "local", and "fake" and "simulated" without a device.
            The block manager "auto" is "prefix", or "paged" with enable_prefix_caching=False.
        queue_policy: who runs next: "fcfs", "priority", "shortest_prompt", "shortest_job",
            "fair_share", or one of your own, as for attention_backend.
        admission_policy: how many run at once: "optimistic", "reserve", "lookahead".
        preemption_policy: who gives up its blocks: "latest", "lowest_priority",
            "fewest_computed".
        step_policy: what a step computes first: "decode_first", "prefill_first".

    Raises:
        ConfigError: an option is out of range or contradicts another.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384
    gpu_memory_utilization: float = 0.9
    kvcache_block_size: int = 256
    num_kvcache_blocks: int | None = None
    kvcache_memory_bytes: int | None = None
    enable_cuda_graphs: bool | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool | None = None
    eviction_policy: PartSpec = "lru"
    tensor_parallel_size: int = 1
    attention_backend: PartSpec = "auto"
    num_speculative_tokens: int = 0
    pipeline_depth: int | None = None
    seed: int = 0
    kv_sanitizer: bool = False
    scheduler: PartSpec = "continuous"
    block_manager: PartSpec = "auto"
    model_runner: PartSpec = "local"
    queue_policy: PartSpec = "fcfs"
    admission_policy: PartSpec = "optimistic"
    preemption_policy: PartSpec = "latest"
    step_policy: PartSpec = "decode_first"

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
        self._check_choices()
        self._check_numbers()
        self._check_pairs()

    def _check_choices(self) -> None:
        if not self.model:
            raise ConfigError("model", self.model, "is empty", "Give a checkpoint folder.")
        for name, choices in (("dtype", _DTYPES), ("device", _DEVICES)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(name, value, "unknown choice", did_you_mean(str(value), choices))
        for name in ("enforce_eager", "kv_sanitizer", *_OPTIONAL_BOOLS):
            value = getattr(self, name)
            optional = name in _OPTIONAL_BOOLS
            if not isinstance(value, bool) and not (optional and value is None):
                raise ConfigError(name, value, "must be a bool", "Use True or False.")
        for name in _PARTS:
            value = getattr(self, name)
            if not callable(value) and not (isinstance(value, str) and value):
                raise ConfigError(
                    name,
                    value,
                    "is neither a name nor something to construct",
                    'Give a registered name, "package.module:Class", a class or a factory.',
                )

    def _check_numbers(self) -> None:
        least = {
            "max_model_len": 2,
            "max_num_seqs": 1,
            "max_num_batched_tokens": 1,
            "kvcache_block_size": 16,
            "num_kvcache_blocks": 1,
            "kvcache_memory_bytes": 1,
            "tensor_parallel_size": 1,
            "num_speculative_tokens": 0,
            "pipeline_depth": 0,
            "seed": 0,
        }
        optional = ("max_model_len", "num_kvcache_blocks", "kvcache_memory_bytes", "pipeline_depth")
        for name, low in least.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(
                    name, value, f"must be an integer >= {low}", f"Use {low} or more."
                )
        if self.kvcache_block_size % 16:
            raise ConfigError(
                "kvcache_block_size",
                self.kvcache_block_size,
                "must be a multiple of 16",
                f"Use {-(-self.kvcache_block_size // 16) * 16}.",
            )
        use = self.gpu_memory_utilization
        if not isinstance(use, (int, float)) or isinstance(use, bool) or not 0 < use <= 1:
            raise ConfigError("gpu_memory_utilization", use, "must be in (0, 1]", "Use e.g. 0.9.")
        if self.tensor_parallel_size > _MAX_RANKS:
            raise ConfigError(
                "tensor_parallel_size",
                self.tensor_parallel_size,
                f"must be at most {_MAX_RANKS}, the devices of one host",
                f"Use {_MAX_RANKS} or fewer.",
            )
        if self.pipeline_depth is not None and self.pipeline_depth > 1:
            raise ConfigError(
                "pipeline_depth", self.pipeline_depth, "must be 0 or 1", "Use 1 to overlap."
            )

    def _check_pairs(self) -> None:
        if self.enforce_eager and self.enable_cuda_graphs:
            raise ConfigError(
                "enforce_eager",
                True,
                "contradicts enable_cuda_graphs=True",
                "Give one of the two.",
            )
        if self.num_kvcache_blocks is not None and self.kvcache_memory_bytes is not None:
            raise ConfigError(
                "num_kvcache_blocks",
                self.num_kvcache_blocks,
                f"contradicts kvcache_memory_bytes={self.kvcache_memory_bytes}",
                "Give one of the two.",
            )
        if self.device == "cpu" and self.enable_cuda_graphs:
            raise ConfigError(
                "enable_cuda_graphs", True, 'contradicts device="cpu"', "Leave it at None."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"is below max_num_seqs={self.max_num_seqs}: a decode step would not fit",
                f"Use {self.max_num_seqs} or more, or lower max_num_seqs.",
            )
