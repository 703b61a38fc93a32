"""Linear layers, whole and in shards, against F.linear on the checkpoint's tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.linear import ColumnLinear, QKVLinear, RowLinear
from layers.norm_rope import RMSNorm, Stream
from layers.parallel import ParallelContext
from tests.layers.tensors import load, place, random_tensors, rms_norm
from utils.errors import ConfigError

HIDDEN = 24
ROWS = [1, 7, 70]
SIZES = {"a": 16, "b": 32}
EPS = 1e-6


def _ranks(size: int) -> list[ParallelContext]:
    return [ParallelContext(rank, size) for rank in range(size)]


def _input(rows: int, size: int = HIDDEN, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(rows + 1000 * seed))


def _linear(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _normed(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return _linear(tensors, name, rms_norm(x, tensors["norm.weight"], EPS).to(x.dtype))


def _checkpoint(sizes: dict[str, int], bias: bool) -> dict[str, Tensor]:
    """Projections of one normalised input."""
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (HIDDEN,)}
    for name, size in sizes.items():
        shapes[f"{name}.weight"] = (size, HIDDEN)
        if bias:
            shapes[f"{name}.bias"] = (size,)
    return random_tensors(shapes)


def _merged(
    folder: Path,
    tensors: dict[str, Tensor],
    parallel: ParallelContext,
    *,
    dtype: torch.dtype = torch.float32,
    gate: str | None = None,
) -> tuple[RMSNorm, ColumnLinear]:
    """The layer of all projections in `tensors` and the norm before it, loaded."""
    names = [name.removesuffix(".weight") for name in tensors if name.endswith("weight")][1:]
    here = place(parallel, dtype)
    sizes = tuple(tensors[f"{name}.weight"].shape[0] for name in names)
    layer = ColumnLinear(HIDDEN, sizes, bias=f"{names[0]}.bias" in tensors, place=here)
    norm = RMSNorm(HIDDEN, EPS, here)
    load(folder, tensors, layer.weight_targets(*names) | norm.weight_targets("norm"))
    norm.prepare()
    layer.prepare(norm, gate=gate)
    return norm, layer


def _row(
    folder: Path, tensors: dict[str, Tensor], parallel: ParallelContext, output_size: int
) -> RowLinear:
    layer = RowLinear(HIDDEN, output_size, bias="o.bias" in tensors, place=place(parallel))
    load(folder, tensors, layer.weight_targets("o"))
    layer.prepare(RMSNorm(output_size, EPS, place(parallel)))
    return layer


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_merged_columns(tmp_path: Path, size: int, bias: bool, rows: int) -> None:
    tensors = _checkpoint({"gate": 32, "up": 16}, bias)
    x = _input(rows)
    parts: dict[str, list[Tensor]] = {"gate": [], "up": []}
    for parallel in _ranks(size):
        norm, layer = _merged(tmp_path, tensors, parallel)
        out, stream = layer(norm(Stream(x)))
        assert stream.part is None
        assert torch.equal(stream.total, x)
        gate, up = torch.split(out, [32 // size, 16 // size], dim=-1)
        parts["gate"].append(gate)
        parts["up"].append(up)
    for name, computed in parts.items():
        torch.testing.assert_close(
            torch.cat(computed, -1), _normed(tensors, name, x), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_read_the_sum_of_the_stream(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: t.to(dtype) for name, t in _checkpoint({"a": 16}, bias=True).items()}
    x, residual = _input(5).to(dtype), _input(5, seed=1).to(dtype)
    norm, layer = _merged(tmp_path, tensors, ParallelContext(), dtype=dtype)
    out, stream = layer(norm(Stream(residual, x)))
    assert stream.part is None
    assert torch.equal(stream.total, x + residual)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        out, _normed(tensors, "a", x + residual), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
def test_gated_columns(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    tensors = _checkpoint({"gate": 16, "up": 16}, bias=False)
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    x = _input(5).to(dtype)
    parts = []
    for parallel in _ranks(size):
        norm, layer = _merged(tmp_path, tensors, parallel, dtype=dtype, gate="silu")
        parts.append(layer(norm(Stream(x)))[0])
    expected = F.silu(_normed(tensors, "gate", x)) * _normed(tensors, "up", x)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(torch.cat(parts, -1), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size"),
    [(4, 4, 1), (6, 1, 1), (4, 2, 2), (8, 2, 4), (8, 1, 8), (12, 2, 2), (4, 4, 4)],
)
def test_qkv_with_replicated_kv_heads(
    tmp_path: Path, num_heads: int, num_kv_heads: int, size: int, bias: bool
) -> None:
    """A rank's query heads must find the KV heads that the whole model gives them."""
    head_dim = 8
    kv_size = num_kv_heads * head_dim
    tensors = _checkpoint({"q": num_heads * head_dim, "k": kv_size, "v": kv_size}, bias)
    x = _input(5)
    whole = {name: _normed(tensors, name, x).view(5, -1, head_dim) for name in "qkv"}
    for parallel in _ranks(size):
        here = place(parallel)
        norm = RMSNorm(HIDDEN, EPS, here)
        layer = QKVLinear(HIDDEN, num_heads, num_kv_heads, head_dim, bias=bias, place=here)
        load(tmp_path, tensors, layer.weight_targets("q", "k", "v") | norm.weight_targets("norm"))
        norm.prepare()
        layer.prepare(norm)
        mine = num_heads // size
        count = max(1, num_kv_heads // size)
        heads = layer(norm(Stream(x)))[0].view(5, -1, head_dim)
        q, k, v = torch.split(heads, [mine, count, count], dim=1)
        for head in range(mine):
            globally = parallel.rank * mine + head
            torch.testing.assert_close(q[:, head], whole["q"][:, globally], rtol=1e-5, atol=1e-5)
            kv_head = globally // (num_heads // num_kv_heads)
            local = head // (mine // count)
            torch.testing.assert_close(k[:, local], whole["k"][:, kv_head], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(v[:, local], whole["v"][:, kv_head], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_sum_to_the_whole_and_add_bias_and_residual_once(
    tmp_path: Path, size: int, bias: bool, rows: int
) -> None:
    tensors = random_tensors({"o.weight": (10, HIDDEN), **({"o.bias": (10,)} if bias else {})})
    x, residual = _input(rows), _input(rows, 10, seed=1)
    total = residual.clone()
    for parallel, share in zip(_ranks(size), x.chunk(size, dim=-1), strict=True):
        layer = _row(tmp_path, tensors, parallel, 10)
        stream = layer(share.contiguous(), Stream(residual))
        if stream.part is None:
            assert size == 1
            total = stream.total
        else:
            assert torch.equal(stream.total, residual)
            total += stream.part
    expected = residual + _linear(tensors, "o", x)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_the_residual_is_left_as_it_was(tmp_path: Path) -> None:
    tensors = random_tensors({"o.weight": (10, HIDDEN)})
    residual = torch.ones(3, 10)
    _row(tmp_path, tensors, ParallelContext(), 10)(_input(3), Stream(residual))
    assert torch.equal(residual, torch.ones(3, 10))


def test_prepare_keeps_one_copy_of_the_weight(tmp_path: Path) -> None:
    _, layer = _merged(tmp_path, _checkpoint({"a": 16}, False), ParallelContext())
    assert layer.weight is None


@pytest.mark.parametrize("size", [3, 5])
def test_sizes_that_do_not_divide_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(ConfigError, match="does not divide") as caught:
        _merged(tmp_path, _checkpoint({"a": 16}, False), ParallelContext(0, size))
    assert caught.value.field == "tensor_parallel_size"


@pytest.mark.parametrize(
    ("num_kv_heads", "size", "expected"),
    [
        (4, 1, [(0, 4)]),
        (4, 2, [(0, 2), (2, 2)]),
        (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]),
        (1, 3, [(0, 1), (0, 1), (0, 1)]),
    ],
)
def test_kv_heads_of_each_rank(
    num_kv_heads: int, size: int, expected: list[tuple[int, int]]
) -> None:
    assert [parallel.kv_heads(num_kv_heads) for parallel in _ranks(size)] == expected


@pytest.mark.parametrize(("num_kv_heads", "size"), [(4, 3), (4, 6), (3, 2)])
def test_kv_heads_that_cannot_be_shared_evenly_are_refused(num_kv_heads: int, size: int) -> None:
    with pytest.raises(ConfigError, match="KV heads"):
        ParallelContext(0, size).kv_heads(num_kv_heads)


@pytest.mark.parametrize("prepared_with_norm", [(True, True), (True, False), (False, True)])
def test_several_layers_may_read_one_norm(
    tmp_path: Path, prepared_with_norm: tuple[bool, bool]
) -> None:
    """As in a mixture of experts; one that knows the norm folds its weight, another does not."""
    tensors = _checkpoint(SIZES, bias=True)
    here = place()
    norm = RMSNorm(HIDDEN, EPS, here)
    layers = {name: ColumnLinear(HIDDEN, (n,), bias=True, place=here) for name, n in SIZES.items()}
    targets = norm.weight_targets("norm")
    for name, layer in layers.items():
        targets |= layer.weight_targets(name)
    load(tmp_path, tensors, targets)
    norm.prepare()
    for layer, known in zip(layers.values(), prepared_with_norm, strict=True):
        layer.prepare(norm if known else None)
    for rows in ROWS:
        x = _input(rows)
        for name, layer in layers.items():
            y, _ = layer(norm(Stream(x)))
            torch.testing.assert_close(y, _normed(tensors, name, x), atol=1e-4, rtol=1e-4)
