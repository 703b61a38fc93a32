"""What a model's forward pass is given besides weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memory.kv_cache import KVLayer


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step, all requests end to end: prefill chunks first, then decodes.

    Attributes:
        input_ids: [T] int64 token ids.
        positions: [T] int64 position of each token in its request.
        slot_mapping: [T] int64 row of the flat KV cache that each token's K and V go to:
            block * block_size + offset.
        rotary: cosines and signed sines at `positions`, each [T, 1, head_dim] float32.
        attention: what the attention backend's `prepare` returned for this step.
        kv: the KV cache of each layer.
        sampled_rows: [R] int64 rows of the T whose logits are wanted; None for all of them.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    rotary: tuple[Tensor, Tensor]
    attention: Any
    kv: list[KVLayer]
    sampled_rows: Tensor | None
