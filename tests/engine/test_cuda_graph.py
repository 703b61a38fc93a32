"""The sizes that are captured; graphs themselves need a device."""

from __future__ import annotations

import pytest
from engine.cuda_graph import capture_sizes


@pytest.mark.parametrize(
    "max_num_seqs", [1, 2, 3, 7, 8, 9, 16, 63, 64, 65, 100, 256, 257, 512, 700]
)
def test_every_batch_size_has_a_capture_and_little_padding(max_num_seqs: int) -> None:
    sizes = capture_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for size in range(1, max_num_seqs + 1):
        padded = next(s for s in sizes if s >= size)
        assert padded < 2 * size or padded <= 8
        if size >= 64:
            assert padded <= 1.25 * size
