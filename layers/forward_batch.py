"""What a model's forward pass is given besides weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memory.kv_cache import KVLayer


@dataclass(frozen=True, slots=True)
class Rotation:
    """Where the tokens of a step stand, and the angles to rotate them by.

    Attributes:
        positions: [T].
        cos, sin: either [T, 1, head_dim] float32 at those positions, the sines signed (see
            `layers.rotary_embedding.rotary_table`); or [max_model_len, head_dim / 2] float32
            for a kernel that looks them up.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step, all requests end to end: prefill chunks first, then decodes.

    Attributes:
        input_ids: [T] int64 token ids.
        slot_mapping: [T] int64 row of the flat KV cache that each token's K and V go to:
            block * block_size + offset.
        rotation: the rotary embedding at `positions`.
        attention: what the attention backend's `prepare` returned for this step.
        kv: the KV cache of each layer.
        sampled_rows: [R] int64 rows of the T whose logits are wanted; None for all of them.
        logits: [R, this rank's columns] where the model may put them; it returns them anyway.
    """

    input_ids: Tensor
    slot_mapping: Tensor
    rotation: Rotation
    attention: Any
    kv: list[KVLayer]
    sampled_rows: Tensor | None
    logits: Tensor | None = None
