"""The contract of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layers.attention.base import AttentionBackend
from layers.norm_rope import RotaryEmbedding, Rotation
from layers.parallel import Place
from memory.kv_cache import KVLayer
from utils.loader import WeightTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What attention and KV cache need to know of a model; `tied`: the head is the embedding."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The T tokens of one step, all requests end to end: prefill chunks first, then decodes.

    Attributes:
        input_ids, slot_mapping: [T] int64, token ids and where K and V go in the flat KV cache.
        attention: what the attention backend's `prepare` returned for this step.
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


class CausalLM(ABC):
    """A model's weights and forward pass on one rank."""

    rotary: RotaryEmbedding

    @abstractmethod
    def __init__(
        self,
        shape: Any,
        hf_config: Any,
        *,
        place: Place,
        backend: AttentionBackend,
        max_model_len: int,
    ) -> None:
        """Allocate the weights for a `shape` that `model_shape` returned."""

    @abstractmethod
    def weight_targets(self) -> dict[str, WeightTarget]:
        """Where each tensor of a Hugging Face checkpoint goes; before `prepare`."""

    @abstractmethod
    def prepare(self) -> None:
        """Prepare every layer for use, its weights being loaded."""

    @abstractmethod
    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Logits of the batch's sampled rows, [R, this rank's share of the vocabulary].

        Rank r's first column is token r * columns; columns past the vocabulary's end are -inf.
        """
