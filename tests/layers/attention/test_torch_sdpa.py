from __future__ import annotations

from layers.attention.torch_sdpa import TorchAttention
from tests.contracts.attention import AttentionContract


class TestTorchAttention(AttentionContract):
    make_backend = TorchAttention
