"""The steps that run as CUDA graphs: decodes, short prefills, and a prefill beside decodes.

There is no graph for both at once, which would take one for every pair of sizes. A step of both
replays one graph after the other: it reads the weights twice, which costs less than launching its
kernels one by one as long as the prefill is short.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.cuda_graph import capture_sizes
from engine.decode_step import DecodeStep
from engine.extras import StepLogits
from engine.prefill_step import PrefillStep
from engine.types import StepPlan

# What launching the kernels of a layer takes the host (an H200's: 11 ms for 28 layers), and about
# the rates at which it reads weights and multiplies by them. Where the two ways meet follows from
# these; it was not measured.
_LAUNCH_SECONDS = 0.4e-3
_BYTES_PER_SECOND = 4e12
_FLOPS = 600e12


class CapturedSteps:
    """Runs what it serves of plans as graphs.

    Args:
        decode: the decode step.
        prefill: the step for short prefills.
        weights_per_layer: of a rank, on average, in elements of 2 bytes.
    """

    def __init__(self, decode: DecodeStep, prefill: PrefillStep, weights_per_layer: int) -> None:
        self._decode = decode
        self._prefill = prefill
        self._captured = False
        once_more = 2 * weights_per_layer / _BYTES_PER_SECOND
        a_token = 2 * weights_per_layer / _FLOPS
        self._most_beside_decodes = int((_LAUNCH_SECONDS - once_more) / a_token)

    def capture(self, max_num_seqs: int) -> None:
        """Capture the steps for every size up to `max_num_seqs` requests."""
        self._decode.capture(capture_sizes(max_num_seqs))
        self._prefill.capture()
        self._captured = True

    def heaviest(self) -> list[Callable[[], object]]:
        """What enqueues the largest steps, of padding and uncaptured."""
        return [self._decode.run_padding, self._prefill.run_padding]

    def rehearsals(self, max_num_seqs: int) -> list[Callable[[], object]]:
        """What enqueues steps of padding that between them need all kernels, uncaptured."""
        # One batch size for each kind of product, and the largest.
        sizes = {n for n in (1, 16, 24, 128, 256) if n < max_num_seqs}
        return [*(partial(self._decode.run_padding, n) for n in sizes), *self.heaviest()]

    def serves(self, plan: StepPlan) -> bool:
        """Whether the plan's rows run as graphs."""
        if not plan.prefill:
            return self._captured
        return self._prefill.fits(plan) and (
            not plan.decode or plan.num_prefill_tokens <= self._most_beside_decodes
        )

    def run(self, plan: StepPlan) -> Tensor:
        """Enqueue a plan that is served; returns its tokens."""
        if not plan.prefill:
            return self._decode.run(plan)
        tokens = self._prefill.run(plan)
        if not plan.decode:
            return tokens
        return torch.cat((tokens, self._decode.run(_decodes(plan))))

    def run_to_logits(self, plan: StepPlan) -> StepLogits:
        """Enqueue a plan that is served up to its logits; storing its tokens has to end it."""
        if not plan.prefill:
            return self._decode.run_to_logits(plan)
        step = self._prefill.run_to_logits(plan)
        if not plan.decode:
            return step
        return StepLogits.joined((step, self._decode.run_to_logits(_decodes(plan))))


def _decodes(plan: StepPlan) -> StepPlan:
    """A plan's decodes without its changes."""
    return StepPlan(plan.step_id, decode=plan.decode)
