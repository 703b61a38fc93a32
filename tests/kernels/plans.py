"""Random plans for the per-slot tables."""

from __future__ import annotations

import random

import torch
from engine.batch import SlotTables

from engine.types import BlockUpdate, NewRequest, PrefillChunk, StepPlan
from sampling_params import SamplingParams

BLOCK_SIZE = 16


def random_plans(
    seed: int, num_slots: int, max_len: int, *, decodes: bool, count: int = 6
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
                blocks = rng.sample(range(999), -(-max_len // BLOCK_SIZE))
                updates.append(BlockUpdate(slot, 0, tuple(blocks)))
            left = known[slot] - computed[slot]
            if left:
                size = rng.choice([left, rng.randint(1, left)])
                chunks.append(PrefillChunk(slot, computed[slot], size, size == left))
                computed[slot] += size
            elif known[slot] and decodes:
                decode.append(slot)
                known[slot] += 1
                computed[slot] += 1
            if known[slot] == computed[slot] and not decodes:
                known[slot] = computed[slot] = 0
        plans.append(StepPlan(step, tuple(new), tuple(updates), tuple(chunks), tuple(decode)))
    return plans


def check_staging(fast: SlotTables, slow: SlotTables, plans: list[StepPlan]) -> None:
    """Both tables make the same rows of every plan, and the same of the tokens sampled for it."""
    for plan in plans:
        if not plan.num_tokens:
            continue
        ours, expected = fast.stage(plan), slow.stage(plan)
        for name in ("input_ids", "positions", "slot_mapping", "sampled_slots"):
            assert getattr(ours, name).tolist() == getattr(expected, name).tolist(), name
        assert ours.sampled_positions.tolist() == expected.sampled_positions.tolist()
        if expected.sampled_rows is not None:
            assert ours.sampled_rows is not None
            assert ours.sampled_rows.tolist() == expected.sampled_rows.tolist()
        for name in ("slots", "context_lens", "query_start"):
            theirs = getattr(expected.attention, name).tolist()
            assert getattr(ours.attention, name).tolist() == theirs, name
        for name in ("num_prefills", "num_prefill_tokens", "max_query_len"):
            assert getattr(ours.attention, name) == getattr(expected.attention, name), name
        sampled = torch.randint(0, 9999, (len(plan.sampled_slots),))
        fast.write_back(ours, sampled.to(fast.tokens.device))
        slow.write_back(expected, sampled)
    for name in ("temperatures", "seeds", "num_computed"):
        assert getattr(fast, name)[:-1].tolist() == getattr(slow, name)[:-1].tolist()


def check_prefill(fast: SlotTables, slow: SlotTables, plans: list[StepPlan], size: int) -> None:
    """Padded rows of plans without decodes: the rows of `SlotTables.stage`, then padding."""
    from layers.kernels.slots import StepRows

    device, padding = fast.tokens.device, fast.padding_slot
    for plan in plans:
        rows = StepRows.empty(size, len(plan.prefill) + 2, len(plan.prefill) + 1, device)
        for name in rows.__slots__:
            getattr(rows, name).fill_(-7)
        fast.stage_prefill(plan, rows)
        expected = slow.stage(plan)
        attention = expected.attention
        tokens, requests = plan.num_prefill_tokens, len(plan.prefill)
        for name, fill in (("input_ids", 0), ("positions", 0), ("slot_mapping", -1)):
            wanted = getattr(expected, name).tolist() + [fill] * (size - tokens)
            assert getattr(rows, name).tolist() == wanted, name
        assert rows.slots.tolist() == [*attention.slots.tolist(), padding, padding]
        assert rows.context_lens.tolist() == [*attention.context_lens.tolist(), 0, 0]
        assert rows.query_start.tolist() == [*attention.query_start.tolist(), tokens, size]
        samples = [i for i, chunk in enumerate(plan.prefill) if chunk.samples]
        assert expected.sampled_rows is not None
        places = dict(zip(samples, range(len(samples)), strict=True))
        for i in range(requests + 1):
            got = [
                int(getattr(rows, name)[i])
                for name in ("sampled_rows", "sampled_slots", "sampled_positions")
            ]
            if i in places:
                at = places[i]
                assert got == [
                    int(expected.sampled_rows[at]),
                    int(expected.sampled_slots[at]),
                    int(expected.sampled_positions[at]),
                ]
            else:
                assert got == [0, padding, 0]
