"""The parts of a model alone on a CUDA device: attention and the linears, in the engine's own form.

Every kernel is captured in a graph, over caches or weights that together exceed the L2 cache, and
checked against its reference before its time counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.roofline import Ceilings
from engine.parts import PART_KINDS
from layers.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from layers.attention.torch_sdpa import TorchAttention
from layers.linear import Matmul, make_matmul
from layers.norm_rope import RMSNorm, Stream
from layers.parallel import ParallelContext, Place
from memory.kv_cache import KVLayer

_PAGE = 256
# Greatest relative error of a product or an attention in bfloat16, as a ratio of norms.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class KernelTime:
    """One kernel, or a chain of them: seconds of each repeat, and the fraction of its limit."""

    name: str
    seconds: list[float]
    fraction: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure_kernels(
    hf_config: dict[str, Any], ceilings: Ceilings, repeats: int
) -> list[KernelTime]:
    """Decode attention, prefill attention (all backends that work here) and the linears.

    Args:
        hf_config: of the model, as in `benchmarks.random_weights.SHAPES`.

    Raises:
        RuntimeError: a kernel's output differs from its reference.
    """
    hidden, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    spec = AttentionSpec(
        num_heads=heads,
        num_kv_heads=hf_config["num_key_value_heads"],
        head_dim=hf_config.get("head_dim", hidden // heads),
        scale=hf_config.get("head_dim", hidden // heads) ** -0.5,
        block_size=_PAGE,
        max_model_len=4096,
        max_num_seqs=512,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    times = []
    with torch.inference_mode():
        known: dict[str, Any] = PART_KINDS["attention_backend"].known()
        for name, part in known.items():
            if name != TorchAttention.name and part.unsupported(spec) is None:
                backend = part(spec)
                times.append(_decode_attention(backend, spec, ceilings, repeats))
                times.append(_prefill_attention(backend, spec, ceilings, repeats))
        sizes = (1, 8, 64, 128, 256)
        times += [_linears(hf_config, spec, batch, ceilings, repeats) for batch in sizes]
    return times


def _graph_seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Device seconds of replays of `run`, captured after a warm-up."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        graph.replay()
        seconds = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record(stream)
            # Two in a row: the second begins without a pause, as steps in a pipeline do.
            graph.replay()
            graph.replay()
            end.record(stream)
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 2e3)
    return seconds


def _check(name: str, got: Tensor, expected: Tensor) -> None:
    error = float((got.double() - expected.double()).norm() / expected.double().norm())
    if not error < _TOLERANCE:
        raise RuntimeError(f"{name} differs from its reference: relative error {error:.3g}")


def _pages(spec: AttentionSpec, num_blocks: int) -> KVLayer:
    shape = (num_blocks, spec.block_size, 2, spec.num_kv_heads, spec.head_dim)
    return KVLayer.of(torch.randn(shape, dtype=spec.dtype, device=spec.device))


def _batch(
    spec: AttentionSpec, count: int, length: int, *, prefill: bool
) -> tuple[AttentionBatch, int]:
    """`count` requests of `length` tokens on pages in random order; their number of pages."""
    per_request = -(-length // spec.block_size)
    order = torch.randperm(count * per_request, dtype=torch.int32, device=spec.device)
    int32: dict[str, Any] = {"dtype": torch.int32, "device": spec.device}
    batch = AttentionBatch(
        block_tables=order.view(count, per_request),
        slots=torch.arange(count, **int32),
        context_lens=torch.full((count,), length, **int32),
        query_start=torch.arange(0, count * length + 1, length, **int32)[: count * prefill + 1],
        num_prefills=count if prefill else 0,
        num_prefill_tokens=count * length if prefill else 0,
        max_query_len=length if prefill else 0,
    )
    return batch, count * per_request


def _attention(
    backend: AttentionBackend,
    spec: AttentionSpec,
    batch: AttentionBatch,
    caches: list[KVLayer],
    rows: int,
    repeats: int,
) -> list[float]:
    """Seconds of one call, after a check of the first cache's result."""
    q = torch.randn(rows, spec.num_heads, spec.head_dim, dtype=spec.dtype, device=spec.device)
    prepared, reference = backend.prepare(batch), TorchAttention(spec)
    expected = reference.attend(q, caches[0], reference.prepare(batch))
    _check(backend.name, backend.attend(q, caches[0], prepared), expected)
    seconds = _graph_seconds(lambda: [backend.attend(q, kv, prepared) for kv in caches], repeats)
    return [s / len(caches) for s in seconds]


def _decode_attention(
    backend: AttentionBackend, spec: AttentionSpec, ceilings: Ceilings, repeats: int
) -> KernelTime:
    count, length = 256, 850
    batch, pages = _batch(spec, count, length, prefill=False)
    caches = [_pages(spec, pages) for _ in range(6)]
    seconds = _attention(backend, spec, batch, caches, count, repeats)
    num_bytes = count * length * 2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
    best = num_bytes / ceilings.read_bandwidth
    name = f"decode attention {count} x {length}, {backend.name}"
    return KernelTime(name, seconds, best / statistics.median(seconds))


def _prefill_attention(
    backend: AttentionBackend, spec: AttentionSpec, ceilings: Ceilings, repeats: int
) -> KernelTime:
    count, length = 4, 4096
    batch, pages = _batch(spec, count, length, prefill=True)
    caches = [_pages(spec, pages) for _ in range(4)]
    seconds = _attention(backend, spec, batch, caches, count * length, repeats)
    # Half of the scores are masked; two products of 2 FLOP.
    flops = count * length * length / 2 * 4 * spec.num_heads * spec.head_dim
    name = f"prefill attention {count} x {length}, {backend.name}"
    return KernelTime(name, seconds, flops / ceilings.matmul_rate / statistics.median(seconds))


@dataclass(frozen=True)
class _Layer:
    """The four products of a decoder layer and the two norms before them."""

    norms: tuple[RMSNorm, RMSNorm]
    qkv: Matmul
    o: Matmul
    gate_up: Matmul
    down: Matmul

    def __call__(self, stream: Stream, width: int) -> Stream:
        """As the model does, but for attention: the first `width` outputs of qkv stand for it."""
        qkv, stream = self.qkv.normed(self.norms[0](stream))
        stream = self.o.added(qkv[:, :width], stream)
        y, stream = self.gate_up.normed(self.norms[1](stream))
        return self.down.added(y, stream)


def _layer(
    hf_config: dict[str, Any], spec: AttentionSpec, weights: list[Tensor], make: Any
) -> _Layer:
    place = Place(ParallelContext(), spec.dtype, spec.device)
    norms = []
    for _ in range(2):
        norm = RMSNorm(hf_config["hidden_size"], 1e-6, place)
        norm.weight.fill_(1.0)
        norms.append(norm)
    qkv, o, gate_up, down = weights
    return _Layer(
        (norms[0], norms[1]),
        make(qkv, place, norms[0], None, False),
        make(o, place, None, norms[1], False),
        make(gate_up, place, norms[1], None, True),
        make(down, place, None, norms[0], False),
    )


def _fused(
    weight: Tensor, place: Place, norm: RMSNorm | None, after: RMSNorm | None, gated: bool
) -> Matmul:
    gate = "silu" if gated else None
    return make_matmul(weight, None, place, norm, after=after, row=after is not None, gate=gate)


def _plain(
    weight: Tensor, place: Place, norm: RMSNorm | None, after: RMSNorm | None, gated: bool
) -> Matmul:
    del norm, after
    return Matmul(weight, None, place, gate="silu" if gated else None)


def _linears(
    hf_config: dict[str, Any],
    spec: AttentionSpec,
    batch: int,
    ceilings: Ceilings,
    repeats: int,
) -> KernelTime:
    """The linears of one decode step, with the norms, gates and residuals between them."""
    hidden, inner = hf_config["hidden_size"], hf_config["intermediate_size"]
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = ((q + 2 * kv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner))
    where: dict[str, Any] = {"dtype": spec.dtype, "device": spec.device}
    layers, plain = [], None
    for _ in range(hf_config["num_hidden_layers"]):
        weights = [torch.randn(shape, **where) * shape[1] ** -0.5 for shape in shapes]
        layers.append(_layer(hf_config, spec, weights, _fused))
        plain = plain or _layer(hf_config, spec, weights, _plain)
    assert plain is not None
    x = torch.randn(batch, hidden, **where)

    def total(layer: _Layer) -> Tensor:
        stream = layer(Stream(x), q)
        if stream.part is None:
            return stream.total
        return stream.total + (stream.part.sum(0) if stream.part.dim() == 3 else stream.part)

    def step() -> None:
        stream = Stream(x)
        for layer in layers:
            stream = layer(stream, q)

    _check(f"linears at batch {batch}", total(layers[0]), total(plain))
    seconds = _graph_seconds(step, repeats)
    elements = sum(rows * columns for rows, columns in shapes) * len(layers)
    best = max(
        elements * spec.dtype.itemsize / ceilings.read_bandwidth,
        2 * elements * batch / ceilings.matmul_rate,
    )
    return KernelTime(f"linears, batch {batch}", seconds, best / statistics.median(seconds))
