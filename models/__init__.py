"""Each model architecture is one file. `models/a_b.py` is for checkpoints of `model_type` a-b.

The file defines a function `model_shape(hf_config)`, which returns a `ModelShape` or raises
UnsupportedModelError, and a class `MODEL`, which is a subclass of `models.base.CausalLM`.
With several ranks `hf_config` is a plain `PreTrainedConfig`. This plain config has the fields of
the model's own config class, but neither the methods nor the `attribute_map` of that class.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from utils.errors import UnsupportedModelError

if TYPE_CHECKING:
    from utils.checkpoint import Checkpoint


def find_architecture(checkpoint: Checkpoint) -> ModuleType:
    """Return the module `models.<model_type>` of a checkpoint, or raise UnsupportedModelError."""
    model_type = str(checkpoint.hf_config.model_type)
    name = f"models.{model_type.replace('-', '_')}"
    known = name.removeprefix("models.").isidentifier()
    try:
        if known and hasattr(module := importlib.import_module(name), "MODEL"):
            return module
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    raise UnsupportedModelError(
        f"{checkpoint.path} is a {model_type!r} model and there is no {name} module for it. "
        "See CONTRIBUTING.md for how to add one."
    )
