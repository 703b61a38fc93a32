"""Finds and makes the engine's parts, and sets options whose value is None or "auto".

A part is an object that an option selects, such as a scheduler, a policy or a model runner. The
option's value is a class, the name of a class, or a *factory function* that makes the part. Only a
class has attributes, such as `policies`, that describe the part. Torch is imported only
inside functions: schedulers import this module and must work without torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from config import Config
from engine.types import BlockManager, Clock, KVGeometry, ModelRunner, Scheduler, WindowPages
from memory.cache_groups import CachingWindowManager, WindowBlockManager
from utils.errors import ConfigError, ContractError
from utils.registry import PartKind

if TYPE_CHECKING:
    import torch

    from layers.attention.base import AttentionBackend, AttentionSpec
    from utils.checkpoint import Checkpoint

POLICIES = ("queue_policy", "admission_policy", "preemption_policy", "step_policy")
_RUNNERS = ("engine", "engine.ranks", "engine.checking")
_ATTENTION = "layers.attention"
# The modules of policies. `policies` has the base classes and the short ones.
_POLICIES, _ADMISSION, _FAIR = "engine.policies", "engine.admission", "engine.fair_share"
_KINDS = (
    PartKind("scheduler", "engine.types:Scheduler", ("engine",)),
    PartKind("queue_policy", f"{_POLICIES}:QueuePolicy", (_POLICIES, _FAIR)),
    PartKind("admission_policy", f"{_POLICIES}:AdmissionPolicy", (_POLICIES, _ADMISSION)),
    PartKind("preemption_policy", f"{_POLICIES}:PreemptionPolicy", (_POLICIES,)),
    PartKind("step_policy", f"{_POLICIES}:StepPolicy", (_POLICIES,)),
    # "auto" never selects "radix", because "radix" finds no more cached tokens than "prefix".
    PartKind("block_manager", "engine.types:BlockManager", ("memory",), ("prefix", "paged")),
    PartKind("eviction_policy", "memory.eviction:EvictionPolicy", ("memory",)),
    PartKind("model_runner", "engine.types:ModelRunner", _RUNNERS),
    PartKind(
        "attention_backend",
        f"{_ATTENTION}.base:AttentionBackend",
        (_ATTENTION,),
        ("triton", "flash_attn", "torch"),
    ),
)
PART_KINDS: Mapping[str, PartKind] = MappingProxyType({kind.option: kind for kind in _KINDS})


def resolve(config: Config, checkpoint: Checkpoint) -> Config:
    """Return `config` with suitable values for the options that are None or "auto".

    The runner sets the number of KV blocks, the attention backend and the use of CUDA graphs later.
    If block_manager is a factory function, `make_block_managers` sets enable_prefix_caching later.

    Raises:
        ConfigError: an option demands something that the machine or the checkpoint does not have,
            names an unknown part, or cannot be combined with the part that another option names.
        UnsupportedModelError: the checkpoint does not state a maximum context length.
    """
    config = _on_device(config, checkpoint)
    # The default max_model_len is at most 4096, to keep block tables and CPU KV caches small.
    limit = checkpoint.max_position
    length = config.max_model_len or min(4096, limit)
    if length > limit:
        problem = f"the checkpoint was made for {limit} positions"
        raise ConfigError("max_model_len", length, problem, f"Use {limit} or less.")
    divided = config.tensor_parallel_size > 1 and config.model_runner == "local"
    runner = "tensor_parallel" if divided else config.model_runner
    blocks, wanted = config.block_manager, config.enable_prefix_caching
    if blocks == "auto":
        blocks = _first("block_manager", lambda part: wanted in (None, part.caches_prefixes))
    config = replace(config, max_model_len=length, model_runner=runner, block_manager=blocks)
    config = replace(config, tokenizer=config.tokenizer or str(checkpoint.path))
    check_policies(config, find("scheduler", config))
    part = find("block_manager", config)
    return _with_caching(config, part) if isinstance(part, type) else config


def _on_device(config: Config, checkpoint: Checkpoint) -> Config:
    """Return the config with device, dtype and pipeline_depth set. CUDA graphs are off on a CPU."""
    import torch

    runner: Any = find("model_runner", config)
    # Whether the runner can use a GPU. A factory function has no `has_device`: True is assumed.
    has_device = getattr(getattr(runner, "func", runner), "has_device", True)
    cuda = has_device and torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("device", "cuda", "there is no usable CUDA device", 'Use "cpu".')
    cuda = cuda and config.device != "cpu"
    # CUDA graphs are on by default. For 1,024 short requests on an H200, Qwen3-0.6B made 94,840
    # tok/s if steps with both prefills and decodes used graphs, and 47,729 if such steps did not.
    graphs = config.enable_cuda_graphs
    if graphs and not cuda:
        problem = "there is no CUDA device to capture on"
        raise ConfigError("enable_cuda_graphs", True, problem, "Leave it at None.")
    if config.enforce_eager or not cuda:
        graphs = False
    # On a CPU, float32 is the default: 16-bit dtypes are rarely faster and never more exact.
    dtype = config.dtype
    if dtype == "auto":
        stored = str(checkpoint.hf_config.dtype or torch.float32).removeprefix("torch.")
        dtype = stored if cuda else "float32"
    # With pipeline_depth 1 the engine plans a step while another step runs. On an H200 this hides
    # 0.26 ms of host time in a step of 256 decode rows. On a CPU a step of one row took 2.4 ms with
    # pipeline_depth 1, and 1.3 ms with pipeline_depth 0.
    depth = int(cuda) if config.pipeline_depth is None else config.pipeline_depth
    device = "cuda" if cuda else "cpu"
    return replace(
        config, device=device, dtype=dtype, enable_cuda_graphs=graphs, pipeline_depth=depth
    )


def _with_caching(config: Config, blocks: Any) -> Config:
    """Set enable_prefix_caching to `blocks.caches_prefixes`. Raises ConfigError on a conflict."""
    caches = blocks.caches_prefixes
    problem = "always caches prefixes" if caches else "does not cache prefixes"
    if config.enable_prefix_caching not in (None, caches):
        raise _conflict(config, "enable_prefix_caching", "block_manager", problem)
    if caches:
        find("eviction_policy", config)
    elif config.eviction_policy != Config.eviction_policy:
        raise _conflict(config, "eviction_policy", "block_manager", problem)
    return replace(config, enable_prefix_caching=caches)


def _conflict(config: Config, option: str, kind: str, problem: str) -> ConfigError:
    """Return a ConfigError: `option` does not work with the part that the option `kind` selects."""
    problem = f"{kind}={getattr(config, kind)!r} {problem}"
    fix = f"Leave it at {getattr(Config, option)!r} or choose another {kind}."
    return ConfigError(option, getattr(config, option), problem, fix)


def find(option: str, config: Config) -> Callable[..., Any]:
    """Return the class or factory that an option names. Raises ConfigError for an unknown name."""
    return PART_KINDS[option].find(getattr(config, option))


def _first(option: str, fits: Callable[[Any], bool]) -> str:
    """Return the name that "auto" stands for: the first part for which `fits` returns True."""
    kind = PART_KINDS[option]
    known = kind.known()
    return next(name for name in kind.auto if name in known and fits(known[name]))


def make(option: str, config: Config, *args: Any) -> Any:
    """Make the part that an option names: call the class or factory with `config` and `args`."""
    return PART_KINDS[option].make(getattr(config, option), config, *args)


def make_scheduler(config: Config, blocks: BlockManager, clock: Clock) -> Scheduler:
    """Make the scheduler. Raises ConfigError if it ignores a policy that an option selects."""
    scheduler: Scheduler = make("scheduler", config, blocks, clock)
    check_policies(config, scheduler)
    return scheduler


def check_policies(config: Config, scheduler: object) -> None:
    """Raise a ConfigError for a policy that does not exist or that `scheduler` would not use."""
    # A factory function has no attribute `policies`: its scheduler is assumed to use every policy.
    used = getattr(scheduler, "policies", POLICIES)
    for option in POLICIES:
        if option in used:
            find(option, config)
        elif getattr(config, option) != getattr(Config, option):
            raise _conflict(config, option, "scheduler", "does not use it")


def make_runner(config: Config, checkpoint: Checkpoint) -> ModelRunner:
    """Make the runner and load the model. Raises ConfigError for unsupported options."""
    refused = _conflict(config, "num_speculative_tokens", "model_runner", "drafts no tokens")
    part: Any = find("model_runner", config)
    # A factory function has no `drafts`. Its runner is asked after it has loaded the model.
    if config.num_speculative_tokens and not getattr(part, "drafts", True):
        raise refused
    runner: ModelRunner = make("model_runner", config, checkpoint)
    if config.num_speculative_tokens and not runner.drafts:
        runner.close()
        raise refused
    return runner


def make_block_managers(
    asked: Config, config: Config, groups: tuple[KVGeometry, ...]
) -> tuple[Config, tuple[BlockManager, ...]]:
    """Make a block manager for each cache group. Also returns the config to use from now on.

    `asked` is the user's config, and `config` is the result of `resolve` for `asked`. A group with
    a sliding window has a manager for windows, and the others have the manager of the config. A
    ConfigError is raised if the latter caches prefixes and cannot do so for several groups.
    """
    if not groups:
        raise ContractError(f"model_runner={config.model_runner!r} has no cache group")
    kind = PART_KINDS["block_manager"]
    windows = [isinstance(group.kind, WindowPages) for group in groups]
    full = [
        kind.make(config.block_manager, config, group)
        for group, window in zip(groups, windows, strict=True)
        if not window
    ]
    caches = next((blocks.caches_prefixes for blocks in full), config.enable_prefix_caching)
    able = all(hasattr(blocks, "cached_tokens") for blocks in full)
    if caches and len(groups) > 1 and not able:
        problem = "it cannot cache prefixes with several cache groups"
        fix = f"Leave it at {Config.block_manager!r}, or derive it from CachingBlockManager."
        raise ConfigError("block_manager", asked.block_manager, problem, fix)
    of_windows = CachingWindowManager if caches else WindowBlockManager
    managers = tuple(
        kind.make(of_windows, config, group) if window else full.pop(0)
        for group, window in zip(groups, windows, strict=True)
    )
    return _with_caching(config, managers[0]), managers


def make_backend(config: Config, spec: AttentionSpec) -> AttentionBackend:
    """Make the attention backend. Raises ConfigError if it cannot run the model on this machine."""
    option, value = "attention_backend", config.attention_backend
    if value == "auto":
        name = _first(option, lambda part: _unsupported(part, spec) is None)
        config = replace(config, attention_backend=name)
    part: Any = find(option, config)
    is_class = inspect.isclass(part)
    # A factory function has no method `unsupported`, so the backend is made before the check.
    backend: Any = part if is_class else PART_KINDS[option].make(part, spec)
    reason = _unsupported(backend, spec)
    if reason is not None:
        raise ConfigError(option, value, reason, 'Use "auto".')
    return PART_KINDS[option].make(part, spec) if is_class else backend  # type: ignore[no-any-return]


def _unsupported(backend: Any, spec: AttentionSpec) -> str | None:
    if spec.windowed and not backend.windows:
        return "it has no sliding windows, and layers of this model have"
    return backend.unsupported(spec)  # type: ignore[no-any-return]


def captures_graphs(config: Config, backend: AttentionBackend, dtype: torch.dtype) -> bool:
    """Whether to capture CUDA graphs. Raises ConfigError if enable_cuda_graphs=True cannot work."""
    import torch

    from layers.kernels.launch import fused

    if config.enable_cuda_graphs is False:
        return False
    possible = backend.captures and fused(torch.device(config.device), dtype)
    if config.enable_cuda_graphs and not possible:
        part = f"attention_backend={backend.name!r} with dtype={config.dtype!r}"
        fix = "Leave it at None, or use the triton backend and half precision."
        raise ConfigError("enable_cuda_graphs", True, f"{part} cannot be captured", fix)
    return possible
