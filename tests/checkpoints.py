"""Small random checkpoints, written by transformers itself, and what transformers makes of them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 259
MAX_POSITION = 512


@dataclass(frozen=True)
class Variant:
    """A random checkpoint: architecture, config fields, and how it is stored."""

    name: str
    architecture: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int = 96
    tied: bool = False
    rope: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG_FACTORS = {
    "short_factor": [1.0 + 0.02 * i for i in range(32)],
    "long_factor": [1.5 + 0.1 * i for i in range(32)],
}

_MINISTRAL3 = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
# A window as long as the longest context.
_FULL = {"num_hidden_layers": 3, "sliding_window": MAX_POSITION} | {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]
}
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100_000.0},
}
VARIANTS = {
    variant.name: variant
    for variant in (
        # Every projection is square here; everywhere else heads * head_dim differs from hidden.
        Variant("qwen3-square-tied", "qwen3", 2, 2, 64, hidden=128, tied=True),
        Variant("qwen3-mha-bias", "qwen3", 2, 2, 64, extra={"attention_bias": True}),
        Variant("qwen3-gqa2-wide-heads", "qwen3", 2, 1, 128),
        Variant(
            "qwen3-gqa4-bias-tied", "qwen3", 4, 1, 64, tied=True, extra={"attention_bias": True}
        ),
        Variant("qwen3-gqa6", "qwen3", 12, 2, 64),
        Variant("qwen2-square", "qwen2", 2, 2, 64, hidden=128),
        Variant("qwen2-gqa2-wide-heads-tied", "qwen2", 4, 2, 128, tied=True),
        Variant("qwen2-gqa6", "qwen2", 6, 1, 64),
        Variant(
            "qwen3-yarn",
            "qwen3",
            4,
            2,
            64,
            rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        Variant("qwen2-linear", "qwen2", 4, 4, 64, rope={"rope_type": "linear", "factor": 3.0}),
        Variant("qwen3-llama3", "qwen3", 4, 1, 64, rope=_LLAMA3),
        Variant(
            "qwen3-dynamic",
            "qwen3",
            2,
            1,
            64,
            rope={"rope_type": "dynamic", "factor": 4.0},
            extra={"max_position_embeddings": 64},
        ),
        Variant(
            "qwen2-longrope",
            "qwen2",
            2,
            1,
            64,
            rope={
                "rope_type": "longrope",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                **_LONG_FACTORS,
            },
        ),
        Variant("qwen3-sharded", "qwen3", 4, 2, 64, max_shard_size="200KB"),
        Variant("qwen2-bfloat16", "qwen2", 4, 1, 64, dtype=torch.bfloat16),
        Variant("llama-tied", "llama", 4, 2, 64, tied=True, rope=_LLAMA3),
        Variant("llama-bias", "llama", 6, 2, 32, extra={"attention_bias": True}),
        Variant("mistral", "mistral", 4, 2, 64, extra={"sliding_window": None}),
        # All layers have one window, which is no multiple of a block.
        Variant("mistral-window", "mistral", 4, 2, 64, extra={"sliding_window": 20}),
        # Layers 1 and 3 have a window, layers 0 and 2 full attention.
        Variant(
            "qwen3-windows",
            "qwen3",
            4,
            2,
            24,
            extra={
                "num_hidden_layers": 4,
                "use_sliding_window": True,
                "sliding_window": 37,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
        ),
        # Layers 0 and 1 have full attention, layer 2 a window.
        Variant(
            "qwen2-window",
            "qwen2",
            4,
            1,
            64,
            extra={
                "num_hidden_layers": 3,
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 2,
            },
        ),
        # Layers 1 and 3 do not rotate and have a window.
        Variant(
            "smollm3-windows",
            "smollm3",
            4,
            2,
            24,
            extra={
                "num_hidden_layers": 4,
                "no_rope_layer_interval": 2,
                "pad_token_id": None,
                "use_sliding_window": True,
                "sliding_window": 33,
            },
        ),
        Variant("ministral", "ministral", 4, 2, 24, extra=_FULL),
        Variant(
            "ministral3", "ministral3", 4, 2, 24, rope=_MINISTRAL3, extra={"pad_token_id": None}
        ),
        # Layers 1 and 3 do not rotate.
        Variant(
            "smollm3-nope",
            "smollm3",
            4,
            2,
            24,
            extra={"num_hidden_layers": 4, "no_rope_layer_interval": 2},
        ),
        Variant(
            "granite",
            "granite",
            4,
            2,
            24,
            tied=True,
            extra={
                "embedding_multiplier": 12.0,
                "residual_multiplier": 0.22,
                "attention_multiplier": 0.0625,
                "logits_scaling": 8.0,
            },
        ),
        Variant("phi3", "phi3", 4, 2, 24),
        Variant("olmo2", "olmo2", 4, 2, 24),
        Variant("olmo3", "olmo3", 4, 2, 24, extra=_FULL | {"rope_parameters": _ROPES}),
        Variant(
            "olmo3-windows",
            "olmo3",
            4,
            2,
            24,
            extra=_FULL | {"rope_parameters": _ROPES, "sliding_window": 24},
        ),
        Variant(
            "gemma3-windows",
            "gemma3_text",
            4,
            2,
            24,
            tied=True,
            extra=_FULL
            | {"rope_parameters": _ROPES, "query_pre_attn_scalar": 40, "sliding_window": 31},
        ),
        Variant("ministral-windows", "ministral", 4, 2, 24, extra=_FULL | {"sliding_window": 18}),
        Variant(
            "gemma3",
            "gemma3_text",
            4,
            2,
            24,
            tied=True,
            extra=_FULL | {"rope_parameters": _ROPES, "query_pre_attn_scalar": 40},
        ),
        Variant(
            "phi3-longrope",
            "phi3",
            4,
            4,
            24,
            rope={
                "rope_type": "longrope",
                "original_max_position_embeddings": 64,
                "short_factor": [1.0 + 0.02 * i for i in range(12)],
                "long_factor": [1.5 + 0.1 * i for i in range(12)],
            },
            extra={"original_max_position_embeddings": 64},
        ),
    )
}


def write_checkpoint(path: Path, variant: Variant, **config_fields: Any) -> Path:
    """Save a random model; all its norms and biases are random too, and matter."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": variant.hidden,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": variant.heads,
        "num_key_value_heads": variant.kv_heads,
        "head_dim": variant.head_dim,
        "max_position_embeddings": MAX_POSITION,
        "initializer_range": 0.15,
        "tie_word_embeddings": variant.tied,
        "rope_parameters": {"rope_theta": 10000.0, **(variant.rope or {"rope_type": "default"})},
        "eos_token_id": None,
        "pad_token_id": None,
        "bos_token_id": None,
    }
    # transformers initialises norms to one and biases to zero, which hides their absence.
    state = torch.get_rng_state()
    torch.manual_seed(zlib.crc32(variant.name.encode()))
    fields |= {**variant.extra, **config_fields}
    config = AutoConfig.for_model(variant.architecture, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    torch.set_rng_state(state)
    model.to(variant.dtype).save_pretrained(path, max_shard_size=variant.max_shard_size)
    return path


class Checkpoints:
    """Writes each variant once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._written: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        if name not in self._written:
            self._written[name] = write_checkpoint(self._root / name, VARIANTS[name])
        return self._written[name]


def reference_model(path: Path) -> Any:
    """The checkpoint as transformers runs it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def reference_logits(model: Any, sequences: list[list[int]], length: int) -> list[Tensor]:
    """Logits [len(tokens), vocab] of each sequence.

    All are padded on the right to `length`, which a causal model does not see, so that rotary
    scalings that depend on the current length take the one of `length`.
    """
    padded = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in sequences])
    logits = model(input_ids=padded, use_cache=False).logits
    return [rows[: len(tokens)] for rows, tokens in zip(logits, sequences, strict=True)]


@dataclass(frozen=True)
class Greedy:
    """Greedy outputs of some prompts, and the smallest lead of any token over the second best."""

    prompts: list[list[int]]
    outputs: list[list[int]]
    smallest_lead: float


@torch.inference_mode()
def reference_greedy(path: Path, prompts: list[list[int]], max_new_tokens: int) -> Greedy:
    """What transformers generates, one prompt at a time, up to an end token of the checkpoint."""
    model = reference_model(path)
    outputs = []
    lead = float("inf")
    for prompt in prompts:
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        outputs.append(generated.sequences[0, len(prompt) :].tolist())
        best = torch.cat(generated.logits).topk(2, dim=-1).values
        lead = min(lead, float((best[:, 0] - best[:, 1]).min()))
    return Greedy(prompts, outputs, lead)


def random_prompts(
    lengths: list[int], *, seed: int, vocab_size: int = VOCAB_SIZE
) -> list[list[int]]:
    """Prompts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]
