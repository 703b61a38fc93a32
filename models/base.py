"""The contract of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layers.attention.base import AttentionBackend
from layers.forward_batch import ForwardBatch
from layers.parallel import Place
from layers.rotary_embedding import RotaryEmbedding
from utils.loader import WeightSlot


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What attention and KV cache need to know of a model, over all ranks.

    Attributes:
        tied: the output head is the embedding.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool


class CausalLM(ABC):
    """A model's weights and forward pass on one rank.

    Attributes:
        rotary: the rotations of the model's positions.
    """

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
        """Allocate the weights.

        Args:
            shape: what the architecture's `model_shape` returned.
            hf_config: the checkpoint's config.
            place: this rank, and dtype and device of the weights.
            backend: attention, shared by all layers.
            max_model_len: positions that the rotary table needs.
        """

    @abstractmethod
    def weight_slots(self) -> dict[str, WeightSlot]:
        """Where each tensor of a Hugging Face checkpoint goes; before `prepare`."""

    @abstractmethod
    def prepare(self) -> None:
        """Prepare every layer for use, its weights being loaded."""

    @abstractmethod
    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Logits of the batch's sampled rows, [R, this rank's share of the vocabulary].

        Rank r's first column is token r * columns; columns past the vocabulary's end are -inf.
        """
