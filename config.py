"""All options of the engine (`Config`), and presets, each of which sets several options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from utils.errors import ConfigError, did_you_mean
from utils.foreign_names import OPTIONS, known_names, names_checked
from utils.rules import Rule, boolean, check_rules, choice, integer, ruled, rules_of, share

# Type of options that choose a part of the engine, such as `scheduler`. The value is a known name,
# an import path "package.module:Class", a class, or a function that constructs the part.
PartSpec = str | type | Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])

PRESETS: dict[str, dict[str, Any]] = {
    # A long prompt delays other requests less: a step has at most 2,048, not 16,384 tokens.
    "low_latency": {"max_num_batched_tokens": 2048, "max_num_seqs": 128},
    "throughput": {
        "gpu_memory_utilization": 0.95,
        "max_num_batched_tokens": 32768,
        "max_num_seqs": 1024,
    },
    # On average half of a request's last KV block is unused. So smaller blocks waste less memory.
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


_TOKENIZER = Rule(
    lambda v: v is None or (isinstance(v, str) and v != ""),
    "must be a folder, the name of a model on the Hugging Face hub, or None",
    "Leave it out for the checkpoint's own tokenizer.",
)
# Names of dtypes in torch and vLLM that differ from those of this engine.
_DTYPES = {"half": "float16", "float": "float32"}


@names_checked(OPTIONS, ConfigError, "option")
@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one engine; immutable. `LLM.config` has actual values instead of None and "auto".

    Attributes:
        model: checkpoint folder, or the name of a model on the Hugging Face hub.
        tokenizer: folder or hub name of the tokenizer. None means the checkpoint's own tokenizer.
        dtype: dtype of weights, activations and KV cache, as a name or as torch's object. "auto"
            means the checkpoint's dtype on CUDA, and float32 on a CPU.
        device: "auto" takes CUDA if there is a usable CUDA device, and the CPU otherwise.
        max_model_len: context window in tokens, prompt and output together. None means 4096, or
            the checkpoint's limit if the limit is smaller.
        max_num_seqs: maximum number of requests that run at once.
        max_num_batched_tokens: maximum tokens in a step, including drafts. At least max_num_seqs.
        gpu_memory_utilization: fraction of a CUDA device's memory that the engine may use.
        kvcache_block_size: tokens per KV block, a multiple of 16.
        num_kvcache_blocks, kvcache_memory_bytes: size of the KV cache of each device, either in
            blocks or in bytes. On CUDA the default is the memory that gpu_memory_utilization
            allows, minus the memory of weights and activations. On a CPU the default is enough for
            max_num_seqs requests of max_model_len tokens, but at most 1 GiB.
        enable_cuda_graphs: run decodes and short prefills as CUDA graphs. None: True if possible.
        enforce_eager: never capture CUDA graphs.
        enable_prefix_caching: share KV blocks between requests with equal prefixes. None means True
            if the block manager can cache prefixes.
        eviction_policy: which cached block is evicted first. "lru": the block released longest ago.
            "lfu": the block that the fewest requests found in the prefix cache. "cost": the block
            with the lowest value. The page docs/caching.md defines the value.
        tensor_parallel_size: number of devices on which the model runs, in one process each.
        attention_backend: "auto" takes the fastest backend that works on the device.
        num_speculative_tokens: maximum number of draft tokens of a request in a step. A draft token
            is kept only if sampling gives the same token, so drafts never change the output. With
            model_runner="local" the value must be 0.
        pipeline_depth: with 0 the engine plans each step after the previous step, with 1 during the
            previous step. None means 1 on CUDA, 0 on a CPU. Both values give the same outputs.
        seed: number from which the engine derives the seeds of requests without a seed.
        check_exact: start only if each request gets the same bits in any company as alone. Where
            this was measured, nothing is run. Otherwise a test runs at start. If the test finds
            other bits, a ConfigError is raised. The page docs/exact.md says what the test tries.
        kv_sanitizer: check uses of KV blocks; slow. Blocks neither in use nor cached contain NaN.
        scheduler: "continuous" or "static".
        model_runner: "local" runs the model. "fake" and "simulated" run no model and need no GPU.
        block_manager: "auto" means "prefix", or "paged" if enable_prefix_caching is False.
        queue_policy, admission_policy: which waiting request runs next, and whether it may run yet.
        preemption_policy: which request loses its blocks when no block is free.
        step_policy: how many tokens of a step may be prompt tokens (see docs/scheduling.md).

    Raises a ConfigError if an option is out of range or contradicts another option.
    """

    model: str
    tokenizer: str | None = ruled(None, _TOKENIZER)
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
    check_exact: bool = ruled(False, boolean())
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
        """Return a Config with the values of `preset`, overridden by the values of `options`.

        An unknown option or preset raises a ConfigError that suggests a known name.
        """
        if preset is not None and preset not in list(PRESETS):
            fix = did_you_mean(str(preset), PRESETS)
            raise ConfigError("preset", preset, "unknown preset", fix)
        options = PRESETS.get(preset or "", {}) | options
        known = [f.name for f in fields(Config)]
        return Config(
            model=str(model), **known_names(options, known, OPTIONS, ConfigError, "option")
        )

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model", self.model, "is empty", "Give a checkpoint folder.")
        if isinstance(self.tokenizer, Path):
            object.__setattr__(self, "tokenizer", str(self.tokenizer))
        # torch.float32 becomes "float32". torch is not imported for this.
        dtype = str(self.dtype).removeprefix("torch.") if _is_dtype(self.dtype) else self.dtype
        if isinstance(dtype, str):
            object.__setattr__(self, "dtype", _DTYPES.get(dtype, dtype))
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
# Pairs of options. A user may set only one option of a pair to True or to a number above 0.
_EITHER = (("enforce_eager", "enable_cuda_graphs"), ("num_kvcache_blocks", "kvcache_memory_bytes"))


def _is_dtype(value: object) -> bool:
    return (type(value).__module__, type(value).__name__) == ("torch", "dtype")


def shows_options(init: Function) -> Function:
    """Decorator of `LLM.__init__`: `help` and completion show the options that `Config` has."""
    types = get_type_hints(Config)
    kind = inspect.Parameter.KEYWORD_ONLY
    given = [one for one in inspect.signature(init).parameters.values() if one.name != "options"]
    given.append(inspect.Parameter("preset", kind, default=None, annotation=str | None))
    given += [
        inspect.Parameter(one.name, kind, default=one.default, annotation=types[one.name])
        for one in fields(Config)
        if one.name != "model"
    ]
    options = (Config.__doc__ or "").partition("    Attributes:\n")[2]
    intro = "Load a model. The options are the fields of `Config`, and a preset.\n\n    Args:\n"
    preset = f"        preset: name of a set of options: {', '.join(PRESETS)}.\n"
    model, _, others = options.partition("        tokenizer:")
    init.__doc__ = f"{intro}{model}{preset}        tokenizer:{others}"
    setattr(init, "__signature__", inspect.Signature(given))  # noqa: B010
    return init
