"""Checkpoints with random weights in the shapes of published models, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_QWEN = {
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 151645,
    "dtype": "bfloat16",
}
_QWEN3 = {**_QWEN, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "qwen2-1.5b": {
        **_QWEN,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": 128001,
        "dtype": "bfloat16",
    },
    # The sizes of SmolLM2-135M with Granite's vocabulary, whose odd size aligns rows to nothing.
    "smollm2-49155": {
        **_QWEN3,
        "vocab_size": 49155,
        "eos_token_id": 0,
        "num_hidden_layers": 30,
        "max_position_embeddings": 8192,
        "head_dim": 64,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


def make_checkpoint(shape: str, folder: Path, device: str) -> Path:
    """Write a bf16 checkpoint of a named shape, without a tokenizer, and return its folder.

    Matrices are normal with deviation 1 / sqrt(inputs), so that activations keep their size
    through the layers and the logits are neither flat nor one-hot.
    """
    config = SHAPES[shape]
    path = folder / shape
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device=device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device)
        scale: float = columns**-0.5
        return (values * scale).bfloat16().cpu()

    save_file(_tensors(config, matrix), path / "model.safetensors")
    return path


def _tensors(config: dict[str, Any], matrix: Any) -> dict[str, torch.Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or hidden // heads
    kind = config["model_type"]
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": ones.clone(),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = ones.clone()
        for name, rows in (("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = matrix(rows, hidden)
            if kind == "qwen2":
                bias = matrix(1, rows).flatten()
                tensors[f"{layer}.self_attn.{name}_proj.bias"] = bias
        if kind == "qwen3":
            for name in ("q_norm", "k_norm"):
                tensors[f"{layer}.self_attn.{name}.weight"] = ones[:1].repeat(dim)
        tensors[f"{layer}.self_attn.o_proj.weight"] = matrix(hidden, heads * dim)
        for name, rows, columns in (
            ("gate", inner, hidden),
            ("up", inner, hidden),
            ("down", hidden, inner),
        ):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = matrix(rows, columns)
    return tensors
