"""Rows of steps made by kernels on a device against plain torch on the CPU."""

from __future__ import annotations

import pytest
import torch

from engine.device_state import DeviceState, Staging
from engine.types import StepPlan
from layers.step_rows import SlotTables
from tests.kernels.plans import BLOCK_SIZE, check_rows, random_plans

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


class _State(DeviceState):
    """Tables on a device that take in each plan as one group of uploads."""

    def __init__(self, device: str, num_slots: int) -> None:
        self._uploads = Staging(torch.device(device), 64)
        tables = SlotTables.zeros(num_slots, 3000, BLOCK_SIZE, torch.device(device))
        super().__init__(tables, self._uploads)

    def apply(self, plan: StepPlan) -> None:
        with self._uploads.group():
            super().apply(plan)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_random_plans(seed: int) -> None:
    check_rows(_State("cuda", 40), _State("cpu", 40), random_plans(seed, 40, 2990))
