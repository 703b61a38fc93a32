"""Random plans for the per-slot tables."""

from __future__ import annotations

import random
from dataclasses import fields

import torch
from torch import Tensor

from engine.device_state import DeviceState
from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepPlan
from layers.step_rows import SampledRows, StepRows
from sampling_params import SamplingParams

BLOCK_SIZE = 16


def _listed(tensors: tuple[Tensor, ...]) -> list[list[int]]:
    return [tensor.tolist() for tensor in tensors]


def random_plans(
    seed: int, num_slots: int, max_len: int, count: int = 6, groups: int = 1
) -> list[StepPlan]:
    """Plans of requests that enter, are computed in chunks, decode and give way to others."""
    rng = random.Random(seed)
    known = [0] * num_slots
    computed = [0] * num_slots
    plans = []
    for step in range(count):
        new, updates, chunks, decode = [], [], [], []
        for slot in rng.sample(range(num_slots), num_slots):
            if known[slot] == computed[slot] and rng.random() < 0.5:
                known[slot], computed[slot] = rng.randint(1, max_len - count), 0
                ids = tuple(rng.randrange(9999) for _ in range(known[slot]))
                params = SamplingParams(temperature=rng.choice([0.0, 0.7]))
                new.append(NewRequest(slot, 100 * step + slot, ids, params, rng.randrange(2**62)))
                for group in range(groups):
                    blocks = rng.sample(range(999), -(-max_len // BLOCK_SIZE))
                    updates.append(BlockUpdate(slot, 0, tuple(blocks), group))
            left = known[slot] - computed[slot]
            if left:
                size = rng.choice([left, rng.randint(1, left)])
                chunks.append(PrefillChunk(slot, computed[slot], size, size == left))
                computed[slot] += size
            elif known[slot]:
                decode.append(slot)
                known[slot] += 1
                computed[slot] += 1
        plans.append(StepPlan(step, tuple(new), tuple(updates), tuple(chunks), tuple(decode)))
    return plans


def check_rows(fast: DeviceState, slow: DeviceState, plans: list[StepPlan]) -> None:
    """Both states make the same rows of every plan, and the same of the tokens drawn for it."""
    for plan in plans:
        if not plan.num_tokens:
            continue
        for state in (fast, slow):
            state.apply(plan)
        ours, expected = fast.rows(plan), slow.rows(plan)
        for field in fields(StepRows):
            got, wanted = getattr(ours, field.name), getattr(expected, field.name)
            if field.name == "slot_mapping":
                got, wanted = _listed(got), _listed(wanted)
            elif isinstance(got, Tensor):
                got, wanted = got.tolist(), wanted.tolist()
            if field.name != "sampled":
                assert got == wanted, field.name
        drawn = torch.randint(0, 9999, (len(plan.sampled_slots),))
        fast.write(ours.sampled, drawn.to(fast.tables.tokens.device))
        slow.write(expected.sampled, drawn)
        for field in fields(SampledRows):
            got, wanted = getattr(ours.sampled, field.name), getattr(expected.sampled, field.name)
            assert got.tolist() == wanted.tolist(), field.name
    for ours_of, theirs in zip(fast.tables.block_tables, slow.tables.block_tables, strict=True):
        assert ours_of[:-1].tolist() == theirs[:-1].tolist()
    for name in ("tokens", "temperatures", "seeds", "num_computed"):
        got, wanted = getattr(fast.tables, name), getattr(slow.tables, name)
        assert got[:-1].tolist() == wanted[:-1].tolist(), name
