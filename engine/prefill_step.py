"""Short prefills as CUDA graphs.

A prefill of a few hundred tokens takes the device 1 to 3 ms and the host some 10 ms of kernel
launches (28 layers on an H200's host), so its time to the first token is all launching. Captured
for a few token counts, it is one launch.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial

import torch
from torch import Tensor

from engine.batch import SlotTables
from engine.extras import StepLogits
from engine.types import StepPlan
from layers.attention.base import AttentionBackend, AttentionBatch
from layers.forward_batch import ForwardBatch
from layers.sampler import Sampler
from memory.kv_cache import KVLayer
from models.base import CausalLM

# Token counts to capture; a step is padded to the next one, by 6 % at most from 2,048 on, where
# the padding costs more than a launch. Beyond the last the device is the slower side.
_SIZES = (*range(128, 1024, 128), *range(1024, 2048, 256), *range(2048, 4097, 128))
# Rows to sample from: 32 instead of 8 cost a lone prompt 0.01 to 0.12 ms; more were not tried.
_MAX_REQUESTS = 32


class PrefillStep:
    """The forward pass of prefills of up to 32 requests and 4,096 tokens, captured.

    Args:
        tables: the per-slot tables.
        max_tokens: most tokens that a step may have at all.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        sampler: Sampler,
        tables: SlotTables,
        kv: list[KVLayer],
        max_tokens: int,
    ) -> None:
        from layers.kernels.slots import StepRows

        self._model = model
        self._backend = backend
        self._sampler = sampler
        self._kv = kv
        self._tables = tables
        self._sizes = [size for size in _SIZES if size <= max_tokens]
        most, device = max(self._sizes, default=0), tables.tokens.device
        self._rows = StepRows.empty(most, _MAX_REQUESTS + 1, _MAX_REQUESTS, device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # Of all graphs: 32 rows of 151,936 bf16 logits are 10 MB.
        self._logits: Tensor | None = None

    def fits(self, plan: StepPlan) -> bool:
        """Whether there is a captured step for the plan's prefill."""
        return (
            bool(self._graphs)
            and len(plan.prefill) <= _MAX_REQUESTS
            and plan.num_prefill_tokens <= self._sizes[-1]
        )

    def run_padding(self) -> None:
        """Enqueue the largest step with padding alone, uncaptured."""
        if self._sizes:
            self._stage_padding()
            self._step(self._sizes[-1])

    def capture(self) -> None:
        """Capture the step for each token count, with padding alone."""
        pool = None
        self._stage_padding()
        for size in reversed(self._sizes):
            if self._logits is None:
                self._logits = torch.empty_like(self._step(size)[0])
            self._step(size)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                logits, tokens = self._step(size)
                # A model need not have put them there.
                if logits is not self._logits:
                    self._logits.copy_(logits)
            pool = graph.pool()
            self._graphs[size] = (graph, tokens)

    def _stage_padding(self) -> None:
        """Rows that read nothing and write nothing that counts."""
        self._tables.stage_prefill(StepPlan(0), self._rows)

    def run(self, plan: StepPlan) -> Tensor:
        """Enqueue the prefill of a plan that fits; returns its tokens."""
        return self._replay(plan)[self._sampled(plan)]

    def run_to_logits(self, plan: StepPlan) -> StepLogits:
        """As `run`, for tokens that are to be drawn anew and overwrite the first ones.

        All of it is overwritten by the next step.
        """
        self._replay(plan)
        assert self._logits is not None
        which, rows, tables = self._sampled(plan), self._rows, self._tables
        slots, positions = rows.sampled_slots[which], rows.sampled_positions[which]
        return StepLogits(
            logits=self._logits[which],
            slots=slots,
            keys=(tables.temperatures[slots], tables.seeds[slots], positions),
            store=partial(self._store, slots, positions),
        )

    def _store(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Store new tokens [R] where the next step reads them."""
        self._tables.tokens[slots, positions] = tokens.to(self._tables.tokens.dtype)

    def _replay(self, plan: StepPlan) -> Tensor:
        """Tokens of a plan that fits, that of chunk i in row i, as its logits."""
        size = self._sizes[bisect_left(self._sizes, plan.num_prefill_tokens)]
        self._tables.stage_prefill(plan, self._rows.first(size))
        graph, tokens = self._graphs[size]
        graph.replay()
        return tokens

    @staticmethod
    def _sampled(plan: StepPlan) -> slice | list[int]:
        """The chunks that sample."""
        samples = [i for i, chunk in enumerate(plan.prefill) if chunk.samples]
        # Mostly the first ones: no copy then.
        return slice(len(samples)) if samples == list(range(len(samples))) else samples

    def _step(self, size: int) -> tuple[Tensor, Tensor]:
        """Enqueue the forward pass and sampling of the rows that are staged: logits and tokens."""
        rows, tables = self._rows.first(size), self._tables
        attention = AttentionBatch(
            block_tables=tables.block_tables,
            slots=rows.slots[:-1],
            context_lens=rows.context_lens[:-1],
            query_start=rows.query_start[:-1],
            num_prefills=_MAX_REQUESTS,
            num_prefill_tokens=size,
            max_query_len=size,
        )
        batch = ForwardBatch(
            input_ids=rows.input_ids,
            slot_mapping=rows.slot_mapping,
            rotation=self._model.rotary.prepare(rows.positions),
            attention=self._backend.prepare(attention),
            kv=self._kv,
            sampled_rows=rows.sampled_rows,
            logits=self._logits,
        )
        slots, positions = rows.sampled_slots, rows.sampled_positions
        temperatures, seeds = tables.temperatures[slots], tables.seeds[slots]
        logits = self._model(batch)
        tokens = self._sampler(logits, temperatures, seeds, positions)
        self._store(slots, positions, tokens)
        return logits, tokens
