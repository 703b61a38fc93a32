"""One decode step as a fixed sequence of kernels over fixed addresses, fit for capture."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch import SlotTables
from engine.cuda_graph import DecodeGraphs
from engine.types import StepPlan
from layers.attention.base import AttentionBackend, AttentionBatch
from layers.forward_batch import ForwardBatch
from layers.sampler import Sampler
from memory.kv_cache import KVLayer
from models.base import CausalLM


class DecodeStep:
    """Embedding to write-back for the requests in a slots tensor; needs Triton on CUDA."""

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        sampler: Sampler,
        tables: SlotTables,
        kv: list[KVLayer],
        block_size: int,
    ) -> None:
        from layers.kernels.slots import DecodeRows

        self._model = model
        self._backend = backend
        self._sampler = sampler
        self._tables = tables
        self._kv = kv
        self._block_size = block_size
        max_size = tables.padding_slot
        self._rows = DecodeRows.empty(max_size, tables.tokens.device)
        shape, device = (max_size,), tables.tokens.device
        self._slots = torch.full(shape, tables.padding_slot, dtype=torch.int64, device=device)
        self._decode: tuple[int, ...] = ()
        self._graphs: DecodeGraphs | None = None

    def __call__(self, slots: Tensor) -> Tensor:
        """Enqueue a step for `slots` [B] int64; returns the sampled tokens [B]."""
        from layers.kernels.slots import gather_decode, scatter_tokens

        tables, rows = self._tables, self._rows.first(slots.shape[0])
        gather_decode(
            slots,
            tables.tokens,
            tables.block_tables,
            tables.num_computed,
            tables.temperatures,
            tables.seeds,
            block_size=self._block_size,
            out=rows,
        )
        attention = AttentionBatch(
            block_tables=tables.block_tables,
            slots=rows.slots,
            context_lens=rows.context_lens,
            query_start=rows.slots[:0],
            num_prefills=0,
            num_prefill_tokens=0,
            max_query_len=0,
        )
        batch = ForwardBatch(
            input_ids=rows.input_ids,
            slot_mapping=rows.slot_mapping,
            rotation=self._model.rotary.prepare(rows.positions),
            attention=self._backend.prepare(attention),
            kv=self._kv,
            sampled_rows=None,
        )
        # A new token's position is the number of tokens before it.
        logits = self._model(batch)
        tokens = self._sampler(logits, rows.temperatures, rows.seeds, rows.context_lens)
        scatter_tokens(tokens, rows, tables.tokens, tables.num_computed)
        return tokens

    def run_padding(self, size: int | None = None) -> Tensor:
        """Enqueue a step of `size` padding rows, the most there can be if None; uncaptured."""
        return self(self._slots[:size])

    def capture(self, sizes: list[int]) -> None:
        """Capture the step for each batch size, with padding rows alone."""
        for size in sizes:
            self(self._slots[:size])
        torch.cuda.synchronize()
        self._graphs = DecodeGraphs(self, self._slots, sizes)

    def run(self, plan: StepPlan) -> Tensor:
        """Enqueue a pure decode plan; returns its tokens."""
        assert self._graphs is not None
        size = len(plan.decode)
        padded = self._graphs.padded(size)
        if plan.decode == self._decode:
            self._tables.apply_changes(plan)
        else:
            self._tables.stage_changes(plan, self._slots[:padded])
            self._decode = plan.decode
        return self._graphs.replay(padded)[:size]
