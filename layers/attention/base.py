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
    """What a backend has to serve: one rank's heads and the cache they read.

    `scale` multiplies the dot products. A decode has up to `rows_per_decode` query rows.
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
    """Which request each query row belongs to; prefill requests first, then decodes.

    Attributes:
        block_tables: [slots, max_blocks] int32, as all tensors here, one row per *slot*; entries
            past a request's blocks are stale.
        slots: [B] row in block_tables of each request.
        context_lens: [B] visible tokens of each request, this step's included; 0 for padding.
        query_start: [num_prefills + 1] first query row of each prefill request, then their end.
        num_prefills: leading requests with any number of query rows; the others are decodes.
        num_prefill_tokens: query rows of the prefill requests; the decodes' rows follow.
        max_query_len: most query rows of a prefill request, 0 without any.
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
    """Causal attention of new tokens over pages; their K and V are in the pages already.

    Query head h reads KV head h // (num_heads // num_kv_heads).
    """

    name: ClassVar[str]
    captures: ClassVar[bool] = False

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        """Why this backend cannot serve `spec` on this machine; None if it can."""
        return None

    @abstractmethod
    def __init__(self, spec: AttentionSpec) -> None: ...

    @abstractmethod
    def prepare(self, batch: AttentionBatch) -> Any:
        """What the layers of one step share; handed to `attend` unchanged."""

    @abstractmethod
    def attend(self, q: Tensor, kv: KVLayer, prepared: Any) -> Tensor:
        """Queries [T, num_heads, head_dim] (rows may be strided) -> [T, num_heads * head_dim].

        A request's n query rows are the last n of its visible tokens.
        """
