"""The contract of an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memory.kv_cache import KVLayer


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a backend has to serve: the attention heads of one rank, and the KV cache they read.

    `scale` multiplies dot products of Q and K. A decode has up to `rows_per_decode` query rows.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    max_model_len: int
    max_num_seqs: int
    dtype: torch.dtype
    device: torch.device
    rows_per_decode: int = 1


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The B requests of a step and their query rows: prefills come first, then decodes.

    Attributes:
        block_tables: [slots, max_blocks] int32, like all tensors here: the block ids of every
            running request. Entries after a request's last block are stale.
        slots: [B] row of each request of the step in `block_tables`.
        context_lens: [B] length of each request with this step's tokens; 0 for padding.
        query_start: [num_prefills + 1] first query row of each prefill, then the end of the last.
        num_prefills, num_prefill_tokens: number of prefills, and total of their query rows.
        max_query_len: no prefill has more query rows than this; 0 if there are no prefills.
        rows_per_decode: number of query rows of each decode.
    """

    block_tables: Tensor
    slots: Tensor
    context_lens: Tensor
    query_start: Tensor
    num_prefills: int
    num_prefill_tokens: int
    max_query_len: int
    rows_per_decode: int = 1


class AttentionBackend(ABC):
    """Causal attention of a step's tokens over the paged KV cache, which has their K and V already.

    Query head h reads KV head h // (num_heads // num_kv_heads).
    """

    name: ClassVar[str]
    captures: ClassVar[bool] = False  # whether CUDA graphs can hold the backend's work

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        """Return why this backend cannot serve `spec` on this machine; None if it can."""
        return None

    @abstractmethod
    def __init__(self, spec: AttentionSpec) -> None: ...

    @abstractmethod
    def prepare(self, batch: AttentionBatch) -> Any:
        """Compute what all layers of one step share; `attend` receives the result unchanged."""

    @abstractmethod
    def attend(self, q: Tensor, kv: KVLayer, prepared: Any) -> Tensor:
        """Return attention output [T, num_heads * head_dim] for queries [T, num_heads, head_dim].

        Rows of `q` may be strided. The n query rows of a request belong to its last n tokens.
        """
