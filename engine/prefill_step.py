"""Short prefills as CUDA graphs.

A prefill of a few hundred tokens takes the device 1 to 3 ms and the host some 10 ms of kernel
launches (28 layers on an H200's host), so its time to the first token is all launching. Captured
for a few token counts, it is one launch.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from engine.batch import StepInputs
from engine.types import StepPlan
from layers.attention.base import AttentionBackend, AttentionBatch
from layers.forward_batch import ForwardBatch
from memory.kv_cache import KVLayer
from models.base import CausalLM

# Token counts to capture; a step is padded to the next one, by 6 % at most from 2,048 on, where
# the padding costs more than a launch. Beyond the last the device is the slower side.
_SIZES = (*range(128, 1024, 128), *range(1024, 2048, 256), *range(2048, 4097, 128))
_MAX_REQUESTS = 8


class PrefillStep:
    """The forward pass of pure prefill steps of up to 8 requests and 4,096 tokens, captured.

    Args:
        block_tables: the static per-slot block tables.
        padding_slot: the row of them that belongs to no request.
        max_tokens: most tokens that a step may have at all.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        kv: list[KVLayer],
        block_tables: Tensor,
        padding_slot: int,
        max_tokens: int,
    ) -> None:
        self._model = model
        self._backend = backend
        self._kv = kv
        self._block_tables = block_tables
        self._padding_slot = padding_slot
        self._sizes = [size for size in _SIZES if size <= max_tokens]
        tokens, device = max(self._sizes, default=0), block_tables.device
        # Rows: token id, position, cache row; and rows to sample, of requests.
        self._tokens = torch.zeros(3, tokens, dtype=torch.int64, device=device)
        self._rows = torch.zeros(_MAX_REQUESTS, dtype=torch.int64, device=device)
        self._slots, self._lens = torch.zeros(2, _MAX_REQUESTS, dtype=torch.int32, device=device)
        self._starts = torch.zeros(_MAX_REQUESTS + 1, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._clear(tokens)

    def fits(self, plan: StepPlan) -> bool:
        """Whether there is a captured step for the plan."""
        return (
            bool(self._graphs)
            and not plan.decode
            and len(plan.prefill) <= _MAX_REQUESTS
            and plan.num_prefill_tokens <= self._sizes[-1]
        )

    def run_padding(self) -> None:
        """Enqueue the largest step with padding alone, uncaptured."""
        if self._sizes:
            self._forward(self._sizes[-1])

    def capture(self) -> None:
        """Capture the step for each token count, with padding alone."""
        pool = None
        for size in reversed(self._sizes):
            self._forward(size)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                logits = self._forward(size)
            pool = graph.pool()
            self._graphs[size] = (graph, logits)

    def run(self, inputs: StepInputs) -> Tensor:
        """Enqueue the forward pass of a plan that fits; logits of its sampled rows.

        They are overwritten by the next run.
        """
        tokens = inputs.input_ids.shape[0]
        size = self._sizes[bisect_left(self._sizes, tokens)]
        self._clear(size)
        self._tokens[0, :tokens] = inputs.input_ids
        self._tokens[1, :tokens] = inputs.positions
        self._tokens[2, :tokens] = inputs.slot_mapping
        attention, count = inputs.attention, inputs.attention.num_prefills
        self._slots[:count] = attention.slots
        self._lens[:count] = attention.context_lens
        # Requests of padding begin and end behind the last token.
        self._starts.fill_(tokens)
        self._starts[: count + 1] = attention.query_start
        rows = inputs.sampled_rows
        assert rows is not None
        self._rows[: rows.shape[0]] = rows
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: rows.shape[0]]

    def _clear(self, size: int) -> None:
        self._tokens[:2, :size] = 0
        self._tokens[2, :size] = -1
        self._slots.fill_(self._padding_slot)
        self._lens.zero_()
        self._rows.zero_()

    def _forward(self, size: int) -> Tensor:
        input_ids, positions, slot_mapping = self._tokens[:, :size]
        attention = AttentionBatch(
            block_tables=self._block_tables,
            slots=self._slots,
            context_lens=self._lens,
            query_start=self._starts,
            num_prefills=_MAX_REQUESTS,
            num_prefill_tokens=size,
            max_query_len=size,
            max_context_len=size,
        )
        batch = ForwardBatch(
            input_ids=input_ids,
            slot_mapping=slot_mapping,
            rotation=self._model.rotary.prepare(positions),
            attention=self._backend.prepare(attention),
            kv=self._kv,
            sampled_rows=self._rows,
        )
        return self._model(batch)
