"""Products of a few rows on a CPU: which weights float16 holds, and that nothing is lost by it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layers.cpu_linear import HalfLinear
from layers.linear import CPUMatmul, make_matmul
from layers.norm_rope import RMSNorm, Stream
from layers.parallel import ParallelContext
from tests.layers.tensors import place, rms_norm

EPS = 1e-6
needs_fbgemm = pytest.mark.skipif(
    not HalfLinear.holds(torch.ones(4, 4)), reason="torch has no FBGEMM here"
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _bfloat16(*shape: int, seed: int = 0) -> Tensor:
    """float32 values of bfloat16's precision."""
    return _random(*shape, seed=seed).bfloat16().float()


@needs_fbgemm
@pytest.mark.parametrize("size", [2.0**-60, 1e-3, 1.0, 3e5])
def test_a_weight_in_float16_is_the_weight(size: float) -> None:
    """Small elements beside large ones as well: plain float16 would round those below 2^-17."""
    weight = (_random(48, 32) * size).bfloat16().float()
    weight[0] *= 2.0**-16
    assert HalfLinear.holds(weight)
    assert torch.equal(HalfLinear(weight, None)(torch.eye(32)), weight.t())


@needs_fbgemm
@pytest.mark.parametrize("rows", [8, 1025], ids=["small", "large"])
def test_a_step_may_sample_no_row(rows: int) -> None:
    linear = HalfLinear(torch.ones(rows, 1024), None)
    assert linear(torch.empty(0, 1024)).shape == (0, rows)


@pytest.mark.parametrize(
    "weight",
    [
        _random(8, 8),
        torch.tensor([[1.0, 1.5 * 2.0**-60]]),
        torch.tensor([[1.0, float("inf")]]),
        torch.tensor([[1.0, float("nan")]]),
        torch.cat((torch.ones(4096, 8), _random(1, 8))),
    ],
    ids=["float32", "range", "inf", "nan", "last row of many"],
)
def test_a_weight_that_would_be_rounded_is_refused(weight: Tensor) -> None:
    assert not HalfLinear.holds(weight)


@needs_fbgemm
def test_zeros_are_held() -> None:
    assert torch.equal(HalfLinear(torch.zeros(16, 8), None)(_random(1, 8)), torch.zeros(1, 16))


@needs_fbgemm
@pytest.mark.parametrize("scaled", [False, True])
def test_products_and_sums(scaled: bool) -> None:
    weight = _bfloat16(40, 24)
    scale = _random(24, seed=1) if scaled else None
    few = HalfLinear(weight, scale)
    rows = int(CPUMatmul(weight, None, place(), None).few_rows)
    assert rows == 64
    x, residual = _random(rows, 24, seed=2), _random(rows, 40, seed=3)
    before = residual.clone()
    factors = torch.ones(24) if scale is None else scale
    expected = ((x * factors).double() @ weight.double().t()).float()
    torch.testing.assert_close(few(x), expected, rtol=1e-5, atol=1e-5)
    total = few.added(x, residual)
    torch.testing.assert_close(total, residual + expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, before)


@needs_fbgemm
def test_the_means_for_each_weight() -> None:
    def few_rows(weight: Tensor) -> float:
        return CPUMatmul(weight, None, place(), None).few_rows

    # 64 and more are float16's, 0 leaves all to oneDNN.
    assert few_rows(_bfloat16(256, 256)) == 64
    assert few_rows(_bfloat16(4096, 256)) == 64
    assert few_rows(_bfloat16(4096, 257)) == math.inf
    assert few_rows(_random(256, 256)) == 0
    assert few_rows(_random(513, 256)) == 0


@needs_fbgemm
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 21, 22, 64])
def test_one_thread_and_all_of_them(
    monkeypatch: pytest.MonkeyPatch, threads: int, rows: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, x = _bfloat16(384, 256), _random(rows, 256, seed=1)
    few = HalfLinear(weight, None)
    assert few.rows_alone == (64 if threads == 1 else 21)
    expected = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(few(x), expected, rtol=1e-5, atol=1e-4)


@needs_fbgemm
@pytest.mark.parametrize(("threads", "packed_at_once"), [(1, 2**23), (2, 2**23), (2, 2**19)])
def test_a_large_weight_is_held_in_float16_alone(
    monkeypatch: pytest.MonkeyPatch, threads: int, packed_at_once: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("layers.cpu_linear._PACKED_AT_ONCE", packed_at_once)
    norm = RMSNorm(1030, EPS, place())
    norm.weight.copy_(_random(1030, seed=2))
    scale = norm.weight.clone()
    norm.prepare()
    weight = _bfloat16(2100, 1030)
    product = make_matmul(weight, None, place(), norm)
    assert isinstance(product, CPUMatmul)
    assert product.few_rows == math.inf
    assert not product.weight.numel()
    for rows in (1, 65, 300):
        x = _random(rows, 1030, seed=rows)
        expected = rms_norm(x, scale, EPS).double() @ weight.double().t()
        torch.testing.assert_close(
            product.normed(norm(Stream(x)))[0], expected.float(), rtol=1e-5, atol=1e-3
        )


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 64, 65])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_product_is_the_same_on_both_sides_of_its_limit(
    rows: int, bias: bool, exact: bool
) -> None:
    make = _bfloat16 if exact else _random
    weight, shift = make(40, 24), _random(40, seed=1) if bias else None
    norm = RMSNorm(24, EPS, place())
    norm.weight.copy_(_random(24, seed=2))
    norm.prepare()
    x, residual = _random(rows, 24, seed=3), _random(rows, 40, seed=4)
    product = make_matmul(weight, shift, place())
    expected = x @ weight.t() + (0 if shift is None else shift)
    torch.testing.assert_close(product(x), expected, rtol=1e-5, atol=1e-5)
    stream = product.added(x, Stream(residual))
    total = stream.total if stream.part is None else stream.total + stream.part
    torch.testing.assert_close(total, residual + expected, rtol=1e-5, atol=1e-5)
    normed = rms_norm(x, norm.weight, EPS).float() @ weight.t() + (0 if shift is None else shift)
    y, before = make_matmul(weight, shift, place(), norm).normed(norm(Stream(x)))
    torch.testing.assert_close(y, normed, rtol=1e-5, atol=1e-5)
    assert before.part is None
    assert torch.equal(before.total, x)


@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize("exact", [False, True])
def test_of_several_ranks_none_adds_the_residual(rows: int, exact: bool) -> None:
    """The sum over ranks would have it once for each of them."""
    weight = (_bfloat16 if exact else _random)(40, 24)
    x, residual = _random(rows, 24, seed=3), _random(rows, 40, seed=4)
    for rank in range(2):
        product = make_matmul(weight, None, place(ParallelContext(rank, 2)))
        stream = product.added(x, Stream(residual))
        assert stream.part is not None
        torch.testing.assert_close(stream.part, x @ weight.t(), rtol=1e-5, atol=1e-5)
        assert torch.equal(stream.total, residual)


def test_nothing_is_printed() -> None:
    """torch calls these operations deprecated; a user can do nothing about it."""
    code = (
        "import torch; from layers.linear import make_matmul; "
        "from layers.parallel import ParallelContext, Place; "
        "place = Place(ParallelContext(), torch.float32, torch.device('cpu')); "
        "make_matmul(torch.ones(8, 8), None, place)(torch.ones(1, 8))"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
