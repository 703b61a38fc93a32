"""Attention by this project's Triton kernels over the paged KV cache: the default on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from layers.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from layers.kernels.launch import dependent_launch, has_triton, has_wgmma
from memory.kv_cache import KVLayer


class TritonAttention(AttentionBackend):
    """Calls `paged_prefill` for prefills and `paged_decode` (split-KV) for decodes."""

    name = "triton"
    captures = windows = True

    @staticmethod
    def unsupported(spec: AttentionSpec) -> str | None:
        if spec.device.type != "cuda":
            return "it needs a CUDA device"
        if not has_triton():
            return "the package triton is not installed"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bfloat16 and float16, not {spec.dtype}"
        return None

    def __init__(self, spec: AttentionSpec) -> None:
        from layers.kernels.decode_launch import decode_workspace

        self._spec = spec
        # Other GPUs have not been measured, and a subclass may compute something else.
        measured = type(self) is TritonAttention and has_wgmma(spec.device)
        self.exact = type(self).exact or measured
        self._pdl = dependent_launch(spec.device)
        heads, rows = (spec.num_heads, spec.num_kv_heads, spec.head_dim), spec.rows_per_decode
        self._workspace = decode_workspace(
            spec.device, *heads, spec.max_model_len, rows_per_request=rows
        )

    def prepare(self, batch: AttentionBatch) -> AttentionBatch:
        return batch

    def attend(self, q: Tensor, kv: KVLayer, prepared: AttentionBatch) -> Tensor:
        from layers.kernels.paged_decode import paged_decode
        from layers.kernels.paged_prefill import paged_prefill

        batch, spec = prepared, self._spec
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        prefills, rows = batch.num_prefills, batch.num_prefill_tokens
        if prefills:
            paged_prefill(
                q[:rows],
                kv,
                batch.block_tables,
                batch.slots[:prefills],
                batch.query_start,
                batch.context_lens[:prefills],
                scale=spec.scale,
                out=out[:rows],
                window=batch.window,
            )
        if rows < q.shape[0]:
            paged_decode(
                q[rows:],
                kv,
                batch.block_tables,
                batch.slots[prefills:],
                batch.context_lens[prefills:],
                scale=spec.scale,
                max_context_len=spec.max_model_len,
                rows_per_request=batch.rows_per_decode,
                out=out[rows:],
                workspace=self._workspace,
                pdl=self._pdl and not prefills,
                window=batch.window,
            )
        return out.flatten(1)
