"""Hidden states of a step's tokens, for requests that ask for them.

Hidden states have the numbers of the `hidden_states` of transformers. Numbers below the number of
the model's layers mean the input of the layer with this number, counted from 0. The number of
layers means the output of the final norm: these are the *final* hidden states, and the others are
*inner* ones. A *last state* is the residual stream before the final norm. A CUDA graph keeps the
last states of its sampled rows. So a decode whose requests ask only for final hidden states runs as
a graph, at no cost for other requests.

A step has T input tokens, of which R are *sampled rows*: from their logits the next tokens are
drawn. A *request row* is a prefill chunk or a decode, i.e. an element of `StepPlan.row_slots`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config
from engine.types import NewRequest, StepPlan
from utils.checkpoint import Checkpoint


class Forwarded(NamedTuple):
    """What a model has computed in a step with R sampled rows.

    Attributes:
        logits: [R, this rank's vocabulary].
        states: tensors that, joined, are the last states of the R rows, [R, hidden_size].
        prompts: for each tensor of `SpecialRows.prompt_rows` the last states of its tokens.
        inputs: for each layer of `SpecialRows.layers` its input for all tokens, [T, hidden_size].
    """

    logits: Tensor
    states: Sequence[Tensor]
    prompts: Sequence[Tensor] = ()
    inputs: Mapping[int, Tensor | None] = MappingProxyType({})


# Index of a request row in `StepPlan.row_slots`, and how many hidden states the row gets.
_Row = tuple[int, int]


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The hidden states of a step.

    Attributes:
        found: for each wanted number of hidden states, as in transformers, a tensor
            [N, hidden_size] of all tokens that want it.
        rows: for each tensor of `found` the request rows that its rows belong to, in this order.
    """

    found: tuple[Tensor, ...]
    rows: tuple[tuple[_Row, ...], ...]

    def pinned(self) -> HiddenStates:
        """Return copies in pinned host memory. The host does not wait for them."""
        copies = []
        for values in self.found:
            copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            copies.append(copy.copy_(values, non_blocking=True))
        return replace(self, found=tuple(copies))

    def by_row(self) -> dict[int, Tensor]:
        """Return each request row's hidden states, [n, hidden_size], by the row's index.

        `found` must be in host memory.
        """
        split: dict[int, Tensor] = {}
        for values, rows in zip(self.found, self.rows, strict=True):
            parts = torch.split(values, [count for _, count in rows])
            # Without the copy, one row's hidden states would keep those of all rows in memory.
            split |= {row: part.clone() for (row, _), part in zip(rows, parts, strict=True)}
        return split


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """The tokens of a step whose hidden states are wanted.

    Attributes:
        inner: for each layer whose input is wanted, the indices of tokens in the step, int64 [N],
            and the request rows that these tokens belong to.
        prompt_rows: indices in the step, int64 [P], of tokens of prefill chunks whose final hidden
            states are wanted; None if there are none.
        decodes: indices among the R sampled rows, int64 [N], of decodes whose final hidden states
            are wanted.
        last: the request rows of `decodes`, then those of `prompt_rows`.
    """

    inner: dict[int, tuple[Tensor, tuple[_Row, ...]]]
    prompt_rows: Tensor | None
    decodes: Tensor
    last: tuple[_Row, ...]

    @staticmethod
    def of(
        plan: StepPlan,
        requests: Mapping[int, NewRequest],
        num_layers: int,
        upload: Callable[[list[int]], Tensor],
    ) -> HiddenRows | None:
        """Return the tokens whose hidden states a plan's requests want; None if there are none."""
        inner: dict[int, tuple[list[int], list[_Row]]] = {}
        prompts: tuple[list[int], list[_Row]] = ([], [])
        decodes: tuple[list[int], list[_Row]] = ([], [])
        first, num_drawn = 0, 0
        for row, slot in enumerate(plan.row_slots):
            chunk = plan.prefill[row] if row < len(plan.prefill) else None
            count = chunk.num_tokens if chunk else 1
            new = requests.get(slot)
            if new is not None and new.sampling.hidden_states is not None:
                begin = max(0, new.sampling.hidden_states_start - chunk.start) if chunk else 0
                layer = layer_of(new.sampling.hidden_states, num_layers)
                wanted = range(first + begin, first + count)
                if layer < num_layers:
                    ids, rows = inner.setdefault(layer, ([], []))
                elif chunk:
                    ids, rows = prompts
                else:
                    (ids, rows), wanted = decodes, range(num_drawn, num_drawn + 1)
                if wanted:
                    ids += wanted
                    rows.append((row, len(wanted)))
            first += count
            num_drawn += chunk is None or chunk.samples
        if not (inner or prompts[0] or decodes[0]):
            return None
        return HiddenRows(
            {layer: (upload(ids), tuple(rows)) for layer, (ids, rows) in inner.items()},
            upload(prompts[0]) if prompts[0] else None,
            upload(decodes[0]),
            (*decodes[1], *prompts[1]),
        )

    def states(self, made: Forwarded, norm: Callable[[Tensor], Tensor]) -> HiddenStates:
        """Return all wanted hidden states. `norm` is the model's final norm."""
        found, rows = [], []
        for layer, (ids, own) in self.inner.items():
            values = made.inputs[layer]
            assert values is not None
            found.append(values.index_select(0, ids))
            rows.append(own)
        if self.last:
            sampled = made.states[0] if len(made.states) == 1 else torch.cat([*made.states])
            last = sampled.index_select(0, self.decodes)
            if self.prompt_rows is not None:
                last = torch.cat((last, made.prompts[-1]))
            found.append(norm(last))
            rows.append(self.last)
        return HiddenStates(tuple(found), tuple(rows))


def no_states(checkpoint: Checkpoint, config: Config) -> Tensor:
    """Return hidden states of no position, [0, hidden_size], in the model's dtype."""
    dtype = getattr(torch, config.dtype)
    return torch.empty(0, int(checkpoint.hf_config.hidden_size), dtype=dtype)


def layer_of(asked: int | str, num_layers: int) -> int:
    """Return the number, from 0 to `num_layers`, that `SamplingParams.hidden_states` means."""
    if isinstance(asked, str):
        return num_layers
    return asked if asked >= 0 else num_layers + 1 + asked
