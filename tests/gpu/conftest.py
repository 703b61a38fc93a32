from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def reference(shipped: Path) -> Any:
    """The shipped model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.bfloat16).cuda().eval()
