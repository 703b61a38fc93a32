"""Attention by the kernels of the optional package flash-attn (FlashAttention-2, Tri Dao)."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from memory.kv_cache import KVLayer

_MIN_VERSION = (2, 7)

# `prepare` returns the batch, the block tables of its requests, int32 [B, max_blocks], and the
# cumulative sum of the prefills' context lengths, which begins with 0, int32 [num_prefills + 1].
_Prepared = tuple[AttentionBatch, Tensor, Tensor]


class FlashAttention(AttentionBackend):
    """Calls `flash_attn_varlen_func` for prefills and `flash_attn_with_kvcache` for decodes."""

    name = "flash_attn"
    captures = True  # each replay of a CUDA graph reads the current lengths from device memory

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        if spec.device.type != "cuda" or torch.cuda.get_device_capability(spec.device) < (8, 0):
            return "it needs a CUDA device of compute capability 8.0 or higher"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bfloat16 and float16, not {spec.dtype}"
        if spec.head_dim > 256 or spec.head_dim % 8:
            return f"it needs a multiple of 8 up to 256 as head_dim, not {spec.head_dim}"
        if spec.block_size % 256:
            return f"it needs a multiple of 256 as kvcache_block_size, not {spec.block_size}"
        return _package_problem()

    def __init__(self, spec: AttentionSpec) -> None:
        import flash_attn

        self._spec, self._package = spec, flash_attn

    def prepare(self, batch: AttentionBatch) -> _Prepared:
        lens = batch.context_lens[: batch.num_prefills]
        key_start = F.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
        return batch, batch.block_tables.index_select(0, batch.slots), key_start

    def attend(self, q: Tensor, kv: KVLayer, prepared: _Prepared) -> Tensor:
        batch, block_table, key_start = prepared
        prefills, rows, spec, parts = batch.num_prefills, batch.num_prefill_tokens, self._spec, []
        if prefills:
            out: Tensor = self._package.flash_attn_varlen_func(
                q[:rows],
                kv.k,
                kv.v,
                cu_seqlens_q=batch.query_start,
                cu_seqlens_k=key_start,
                max_seqlen_q=batch.max_query_len,
                # A CUDA graph fixes this number for all replays: the longest possible context.
                max_seqlen_k=spec.max_model_len,
                softmax_scale=spec.scale,
                causal=True,
                block_table=block_table[:prefills],
            )
            parts.append(out)
        if prefills < batch.slots.shape[0]:
            out = self._package.flash_attn_with_kvcache(
                q[rows:].view(-1, batch.rows_per_decode, *q.shape[1:]),
                kv.k,
                kv.v,
                cache_seqlens=batch.context_lens[prefills:],
                block_table=block_table[prefills:],
                softmax_scale=spec.scale,
                causal=True,
            )
            parts.append(out.flatten(0, 1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _package_problem() -> str | None:
    """Return why the installed flash-attn cannot be used, or None if it can."""
    try:
        import flash_attn
    except ImportError as error:  # flash-attn is missing, or was built for another version of torch
        return f"the package flash-attn cannot be imported ({error}); README.md says how to get it"
    # Versions from 3.0 on have the same package name, but other functions.
    version = str(getattr(flash_attn, "__version__", "unknown"))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not _MIN_VERSION <= tuple(map(int, found.groups())) < (3, 0):
        return f"it needs flash-attn 2.7 or a later 2.x, not {version}"
    return None
