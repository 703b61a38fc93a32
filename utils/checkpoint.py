"""Opens a checkpoint folder and reads its configuration files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from utils.errors import CheckpointError, CheckpointNotFoundError, UnsupportedModelError
from utils.files import read_json
from utils.rules import Rule, boolean, integer, number

# Rules for fields of config.json and of objects in it. transformers checks types, but no ranges.
_FIELDS = {
    name: rule
    for rule, names in (
        (integer(1, 10_000), "num_hidden_layers num_labels"),
        (integer(1, 2**31), "hidden_size intermediate_size head_dim vocab_size"),
        (integer(1, 2**31), "num_attention_heads num_key_value_heads max_position_embeddings"),
        (number(0, 1, ""), "rms_norm_eps"),
        (boolean(), "attention_bias tie_word_embeddings truncate"),
        (number(1e-9, 1e12, ""), "rope_theta factor original_max_position_embeddings"),
        (number(1e-9, 1e12, ""), "short_factor long_factor low_freq_factor high_freq_factor"),
        (number(1e-9, 1e12, ""), "attention_factor beta_fast beta_slow"),
        (number(0, 1e12, ""), "mscale mscale_all_dim llama_4_scaling_beta"),
        (number(1e-6, 1e6, ""), "residual_multiplier embedding_multiplier attention_multiplier"),
        (number(1e-6, 1e6, ""), "logits_scaling query_pre_attn_scalar"),
        (Rule(lambda value: isinstance(value, str), "must be a text", ""), "dtype torch_dtype"),
        (
            Rule("model.safetensors".__eq__, "must be the file read here", ""),
            "transformers_weights",
        ),
        (Rule(lambda value: False, "must be a JSON object", ""), "rope_parameters rope_scaling"),
    )
    for name in names.split()
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its configuration, without the weights (see `utils.loader`)."""

    path: Path
    hf_config: Any  # content of config.json, as transformers' configuration object
    # Ids of the end-of-sequence tokens, from generation_config.json and config.json.
    eos_token_ids: frozenset[int]

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_fields, (self.path, self.hf_config.to_dict(), self.eos_token_ids)

    @property
    def max_position(self) -> int:
        """Maximum context length in tokens that the checkpoint supports with its rope scaling."""
        limit = getattr(self.hf_config, "max_position_embeddings", None)
        if not isinstance(limit, int):
            kind = self.hf_config.model_type
            problem = f"is a {kind!r} model whose config has no max_position_embeddings"
            if hasattr(self.hf_config, "text_config"):
                problem = f"is a {kind!r} model with other parts beside text, which are not built"
            raise UnsupportedModelError(f"{self.path} {problem}")
        ropes = getattr(self.hf_config, "rope_parameters", None) or {}
        kinds = [rope for rope in ropes.values() if isinstance(rope, dict)]
        # Parameters by kind of layer: layers with a window see no position beyond the window.
        return max(self._extended(limit, rope) for rope in kinds or [ropes])

    def _extended(self, limit: int, rope: Mapping[str, Any]) -> int:
        if rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
            return limit
        original = rope.get("original_max_position_embeddings") or limit
        factor = rope.get("factor", 1.0)
        if not all(isinstance(value, (int, float)) for value in (original, factor)):
            problem = f"factor={factor!r}, original_max_position_embeddings={original!r}"
            raise CheckpointError(f"{self.path}: rope_parameters has {problem}")
        return max(limit, int(original * factor))


def _from_fields(path: Path, fields: dict[str, Any], eos_token_ids: frozenset[int]) -> Checkpoint:
    # Unpickling uses PreTrainedConfig: importing the model's own config class would take 1.4 s.
    return Checkpoint(path, PreTrainedConfig.from_dict(fields), eos_token_ids)


def open_checkpoint(model: str) -> Checkpoint:
    """Open a checkpoint folder, or a Hugging Face hub model, which is downloaded if necessary.

    Raises a CheckpointError if the model does not exist or has no usable config.json.
    """
    path = folder_of(model)
    config_file = path / "config.json"
    if not os.path.lexists(config_file):
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json")
    fields = read_json(config_file, CheckpointError)
    if fields.get("per_layer_config"):
        raise UnsupportedModelError(f"{config_file} has per_layer_config, sizes of single layers")
    try:
        _check(fields)
        model_type = fields.get("model_type")
        known = model_type in CONFIG_MAPPING_NAMES
        with _without_models():
            hf_config = AutoConfig.from_pretrained(path) if known else None
    # Every Exception is caught: transformers' configuration classes raise many types of errors.
    except Exception as error:
        raise CheckpointError(f"{config_file} is unusable: {error}") from error
    if hf_config is None:
        unknown = f"model_type={model_type!r}, which the installed transformers does not know"
        raise UnsupportedModelError(f"{config_file} has {unknown}")
    return Checkpoint(path, hf_config, _eos_token_ids(path, hf_config))


@contextmanager
def _without_models() -> Iterator[None]:
    """Let imports of transformers' table of model classes fail in the `with` block.

    Some versions of transformers import the table for the docstrings of configuration classes, and
    the table imports some 2,000 modules, which took 4 to 5 s with transformers 5.17. If the import
    fails, these versions leave the model's name out of the docstring. Imports of the table by other
    threads fail too, but the block takes only some milliseconds.
    """
    table: dict[str, Any] = sys.modules
    name = "transformers.models.auto.modeling_auto"
    hidden = name not in table
    if hidden:
        table[name] = None  # None in `sys.modules` makes an import fail
    try:
        yield
    finally:
        if hidden:
            table.pop(name, None)


def _check(fields: Mapping[str, Any]) -> None:
    """Raise a ValueError for the first wrong field. None stands for transformers' default."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _check(value)
        elif value is not None and (rule := _FIELDS.get(name)):
            # A list has a value for each layer or for each rotary frequency.
            for one in value if isinstance(value, list) else [value]:
                if not rule.allows(one):
                    raise ValueError(f"{name}={one!r:.80} {rule.problem}. Correct the file.")


def folder_of(model: str, option: str = "model") -> Path:
    """Return the folder of this path, or that of a hub model, which is downloaded if necessary.

    Raises a CheckpointNotFoundError that names the `option` if there is none.
    """
    # Unlike methods of `Path`, these functions raise no errors for odd names, e.g. too long names.
    path = Path(os.path.expanduser(model))
    # A path that is read later must not depend on the current directory then.
    return path.absolute() if os.path.isdir(path) else _from_hub(model, option)


def _from_hub(model: str, option: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    missing = f"{option}={model!r}: there is no such folder"
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointNotFoundError(missing)
    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    # The engine reads no files of subfolders, and no weights under these names.
    unread = ["*/*", "consolidated*", "adapter_*"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=unread))
    # huggingface_hub raises errors of all these types if it cannot find or download the model.
    except (HFValidationError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointNotFoundError(f"{missing}, and the hub gave none ({error})") from error


def generation_config(path: Path) -> dict[str, Any]:
    """Return the fields of generation_config.json, {} if absent. CheckpointError: unusable file."""
    file = path / "generation_config.json"
    return read_json(file, CheckpointError) if os.path.lexists(file) else {}


def _eos_token_ids(path: Path, hf_config: Any) -> frozenset[int]:
    found: set[int] = set()
    values = (getattr(hf_config, "eos_token_id", None), generation_config(path).get("eos_token_id"))
    for value in values:
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise CheckpointError(f"{path}: eos_token_id={value!r} is no token id, nor several")
        found.update(tokens)
    # Token ids outside the vocabulary are left out, because they are never sampled.
    size = getattr(hf_config, "vocab_size", None)
    return frozenset(token for token in found if size is None or token < size)
