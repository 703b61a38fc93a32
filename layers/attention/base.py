"""The interface of attention backends. A query row is the queries of one token, for all heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memory.kv_cache import KVLayer


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a backend must support: the attention heads of one rank, the layout of the KV cache."""

    num_heads: int  # query heads of the rank
    num_kv_heads: int  # KV heads of the rank
    head_dim: int  # elements of a head
    scale: float  # multiplies dot products of Q and K
    block_size: int  # positions per block of the KV cache
    max_model_len: int  # maximum number of tokens of a request
    max_num_seqs: int  # maximum number of requests in a step
    dtype: torch.dtype  # of Q, K and V
    device: torch.device  # where all tensors are
    rows_per_decode: int = 1  # maximum number of query rows of a decode
    windowed: bool = False  # whether some layers have a sliding window


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The B requests of a step: prefills come first, then decodes. All tensors are int32.

    Attributes:
        block_tables: block ids of all running requests, [slots + 1, max_blocks]. Entries after a
            request's last block have no meaning. The last row is for CUDA graphs' padding requests.
        slots: index of each request's row in `block_tables`, [B].
        context_lens: each request's number of tokens up to its last query row, [B]; 0 for padding.
        query_start: index of each prefill's first query row, followed by the index after the last
            query row of the last prefill, [num_prefills + 1].
        num_prefills, num_prefill_tokens: number of prefills, and of query rows before the decodes.
        max_query_len: upper bound of a prefill's number of query rows; 0 if there is no prefill.
        rows_per_decode: number of query rows of each decode.
        window: a token attends to itself and the `window - 1` tokens before it; None for all
            tokens. Blocks of tokens before the windows of all query rows may hold anything, also
            NaN, and their block ids have no meaning.
    """

    block_tables: Tensor
    slots: Tensor
    context_lens: Tensor
    query_start: Tensor
    num_prefills: int
    num_prefill_tokens: int
    max_query_len: int
    rows_per_decode: int = 1
    window: int | None = None


class AttentionBackend(ABC):
    """Causal attention over a paged KV cache that already contains K and V of the step's tokens."""

    name: ClassVar[str]  # the value of the option `attention_backend`
    captures: ClassVar[bool] = False  # whether a CUDA graph can capture the backend's work
    windows: ClassVar[bool] = False  # whether the backend reads `AttentionBatch.window`
    exact: bool = False  # whether it was measured that no other request changes an output's bits

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        """Return why this backend cannot serve `spec` on this machine, or None if it can."""
        return None

    @abstractmethod
    def __init__(self, spec: AttentionSpec) -> None: ...

    @abstractmethod
    def prepare(self, batch: AttentionBatch) -> Any:
        """Compute what all layers of a step need. The caller passes the result to `attend`."""

    @abstractmethod
    def attend(self, q: Tensor, kv: KVLayer, prepared: Any) -> Tensor:
        """Return attention outputs [T, num_heads * head_dim] for queries [T, num_heads, head_dim].

        Query head h uses KV head h // (num_heads // num_kv_heads). `q` and the result have the
        dtype of the `AttentionSpec`. Rows of `q` need not be adjacent in memory. If a request has n
        query rows, these are the queries of its last n tokens. Outputs for padding may be anything.
        """
