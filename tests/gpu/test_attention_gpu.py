"""The backends for CUDA under the contract."""

from __future__ import annotations

import pytest
import torch

from layers.attention.triton_paged import TritonAttention
from tests.contracts.attention import AttentionContract

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


class TestTritonAttention(AttentionContract):
    make_backend = TritonAttention
    device = "cuda"
    dtypes = (torch.bfloat16, torch.float16)
