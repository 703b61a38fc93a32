"""The interface that every model implements, and the arguments of its methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from layers.attention.base import AttentionBackend
from layers.parallel import Place
from layers.rotary import RotaryEmbedding, Rotation
from memory.kv_cache import KVLayer
from utils.loader import WeightTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model, on all ranks together. Layers with equal windows are one cache group."""

    num_layers: int  # number of decoder layers
    num_heads: int  # number of query heads
    num_kv_heads: int  # number of KV heads
    head_dim: int  # elements of a head
    tied: bool  # whether the head uses the embedding's weight
    score_scale: float | None = None  # factor of dot products of Q and K; None: 1 / sqrt(head_dim)
    windows: tuple[int | None, ...] = ()  # each layer's sliding window, None for none; () for none

    @property
    def group_windows(self) -> tuple[int | None, ...]:
        """The window of each cache group."""
        return tuple(dict.fromkeys(self.windows or (None,)))

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """The index of each layer's cache group."""
        return tuple(map(self.group_windows.index, self.windows or (None,) * self.num_layers))

    @property
    def attention_scale(self) -> float:
        """What dot products of Q and K are multiplied by."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The T tokens of one step: those of the prefill chunks first, then those of the decodes.

    Attributes:
        input_ids: token ids, int64 [T].
        slot_mapping: for each cache group the index in `KVLayer.flat` where each token's K and V
            are stored, int64 [T].
        rotations: result of `CausalLM.rotary.prepare`.
        attention: for each cache group the result of `AttentionBackend.prepare`.
        kv: the KV cache of each layer, in the order of the layers.
        sampled_rows: indices of the tokens whose logits are needed, int64 [R]; None for all tokens.
        logits: optional buffer for logits, [R, this rank's columns]; a model may ignore the buffer.
        inputs: the model stores the input of layer i, [T, hidden_size], here for each key i.
    """

    input_ids: Tensor
    slot_mapping: tuple[Tensor, ...]
    rotations: tuple[Rotation, ...]
    attention: tuple[Any, ...]
    kv: list[KVLayer]
    sampled_rows: Tensor | None
    logits: Tensor | None = None
    inputs: dict[int, Tensor | None] = field(default_factory=dict)


class CausalLM(ABC):
    """A model's weights and forward pass on one rank."""

    # The runner calls `rotary.prepare` once before each forward pass, with positions [T] int64, and
    # passes the result as `ForwardBatch.rotations`. Models that rotate nothing need a `rotary` too.
    rotary: RotaryEmbedding
    exact: bool = False  # whether it was measured that no other token changes a request's bits

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
        """Allocate this rank's weights. `shape` is the result of the model file's `model_shape`."""

    @abstractmethod
    def weight_targets(self) -> dict[str, WeightTarget]:
        """Map each tensor name of a Hugging Face checkpoint to the weight that it is loaded to."""

    @abstractmethod
    def prepare(self) -> None:
        """Prepare every layer for use, after the weights are loaded."""

    @abstractmethod
    def __call__(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Return logits [R, columns] and `states`, for the tokens `batch.sampled_rows`.

        The logits have the model's dtype. All ranks have equally many columns. With several ranks,
        `columns` is a multiple of 4. Column c of rank r is for token id r * columns + c. Columns
        after the vocabulary are -inf.
        """

    @abstractmethod
    def states(self, batch: ForwardBatch) -> Tensor:
        """Return the last layer's output of the tokens `batch.sampled_rows`, [R, hidden_size]."""

    @abstractmethod
    def normed(self, states: Tensor) -> Tensor:
        """Return the final norm of `states`, [R, hidden_size]."""

    @abstractmethod
    def head(self, states: Tensor) -> Tensor:
        """Return the logits that `__call__` returns for tokens with these `states`."""
