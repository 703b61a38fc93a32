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
    """What a backend has to serve: the attention heads of one rank, and the layout of the KV cache.

    `scale` multiplies dot products of Q and K. `rows_per_decode` is the maximum over all batches.
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
    """The B requests of a step: prefills come first, then decodes. All tensors are int32.

    Attributes:
        block_tables: block ids of all running requests, [slots + 1, max_blocks]. Entries after a
            request's last block are stale. The last row of the table belongs to padding.
        slots: index of each request's row in `block_tables`, [B].
        context_lens: length of each request including this step's tokens, [B]; 0 for padding.
        query_start: index of each prefill's first query row, and as last element the end of the
            last prefill, [num_prefills + 1].
        num_prefills, num_prefill_tokens: number of prefills, and total number of their query rows.
        max_query_len: upper bound of a prefill's number of query rows; 0 without prefills.
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
    """Causal attention over the paged KV cache, which already has K and V of the step's tokens.

    Query head h reads KV head h // (num_heads // num_kv_heads).
    """

    name: ClassVar[str]
    captures: ClassVar[bool] = False  # whether a CUDA graph can capture the backend's work

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        """Return why this backend cannot serve `spec` on this machine, or None if it can."""
        return None

    @abstractmethod
    def __init__(self, spec: AttentionSpec) -> None: ...

    @abstractmethod
    def prepare(self, batch: AttentionBatch) -> Any:
        """Return data that all layers of a step share; the caller passes the data to `attend`."""

    @abstractmethod
    def attend(self, q: Tensor, kv: KVLayer, prepared: Any) -> Tensor:
        """Return attention output [T, num_heads * head_dim] for queries [T, num_heads, head_dim].

        `q` and the result have the dtype of the `AttentionSpec`. Rows of `q` may be strided. The n
        query rows of a request are those of its last n tokens. Padding rows may get any result.
        """
