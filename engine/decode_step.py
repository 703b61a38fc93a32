"""One decode step as a fixed sequence of kernels over fixed addresses, fit for capture."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.batch import SlotTables
from engine.cuda_graph import DecodeGraphs
from engine.extras import StepLogits
from engine.types import StepPlan
from layers.attention.base import AttentionBackend, AttentionBatch
from layers.forward_batch import ForwardBatch
from layers.sampler import Sampler
from memory.kv_cache import KVLayer
from models.base import CausalLM

if TYPE_CHECKING:
    from layers.kernels.slots import DecodeRows


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
        self._to_logits: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: Tensor | None = None

    def __call__(self, slots: Tensor) -> Tensor:
        """Enqueue a step for `slots` [B] int64; returns the sampled tokens [B]."""
        logits, rows = self._forward(slots)
        # A new token's position is the number of tokens before it.
        tokens = self._sampler(logits, rows.temperatures, rows.seeds, rows.context_lens)
        self._store(rows, tokens)
        return tokens

    def _store(self, rows: DecodeRows, tokens: Tensor) -> None:
        """Enqueue the end of a step: the tokens [B] drawn for its rows."""
        from layers.kernels.slots import scatter_tokens

        scatter_tokens(tokens, rows, self._tables.tokens, self._tables.num_computed)

    def _forward(self, slots: Tensor, out: Tensor | None = None) -> tuple[Tensor, DecodeRows]:
        """Enqueue a step up to its logits [B, V], best in `out`; also returns its rows."""
        from layers.kernels.slots import gather_decode

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
            logits=out,
        )
        return self._model(batch), rows

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
        """Enqueue a plan's decodes; returns their tokens."""
        assert self._graphs is not None
        return self._graphs.replay(self._stage(plan))[: len(plan.decode)]

    def run_to_logits(self, plan: StepPlan) -> StepLogits:
        """Enqueue a plan's decodes up to their logits; storing their tokens has to end it.

        The first step of a captured size runs uncaptured, and captures it for the next ones. All
        of it is overwritten by the next step.
        """
        padded, size = self._stage(plan), len(plan.decode)
        graph = self._to_logits.get(padded)
        if graph is None:
            logits, rows = self._capture_to_logits(padded)
        else:
            graph.replay()
            assert self._logits is not None
            logits, rows = self._logits, self._rows
        rows = rows.first(size)
        return StepLogits(
            logits=logits[:size],
            slots=rows.slots,
            keys=(rows.temperatures, rows.seeds, rows.context_lens),
            store=partial(self._store, rows),
        )

    def _capture_to_logits(self, padded: int) -> tuple[Tensor, DecodeRows]:
        """Enqueue the step that is staged up to its logits, and capture it."""
        assert self._graphs is not None
        slots = self._slots[:padded]
        logits, rows = self._forward(slots)
        if self._logits is None:
            shape = (self._slots.shape[0], logits.shape[1])
            self._logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=self._graphs.pool, stream=stream):
            target = self._logits[:padded]
            made, _ = self._forward(slots, target)
            # A model need not have put them there.
            if made is not target:
                target.copy_(made)
        self._to_logits[padded] = graph
        return logits, rows

    def _stage(self, plan: StepPlan) -> int:
        """Take in a plan; returns the captured size that serves it."""
        assert self._graphs is not None
        padded = self._graphs.padded(len(plan.decode))
        if plan.decode == self._decode:
            self._tables.apply_changes(plan)
        else:
            self._tables.stage_changes(plan, self._slots[:padded])
            self._decode = plan.decode
        return padded
