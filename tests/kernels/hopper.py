"""Compiles the kernels for compute capability 9.0 on a machine without a GPU.

`python -m tests.kernels.hopper [part ...]` calls the launchers on CPU tensors, with a driver that
stands in for a GPU's, and has every launch compile instead. A line for each kernel tells its
registers and its bytes of stack: registers that were spilled, which cost time on every call.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BF16 = torch.bfloat16


class _Hopper:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(_BIN / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    registers, stack, local = map(int, found[-1])
    return registers, stack + local


def _serialised(ptx: str) -> bool:
    """Whether the assembler makes each wgmma wait for the one before, of which it only informs."""
    if "wgmma.mma_async" not in ptx:
        return False
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(_BIN / "ptxas"), "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.search(r"C75\d\d|serializ", told) is not None


def stand_in() -> None:
    """Have every launch compile for a GPU of compute capability 9.0, and tell what came of it."""
    driver.set_active(_Hopper())
    told: set[str] = set()

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(function, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in told:
            told.add(compiled.hash)
            registers, stack = _usage(compiled.asm["cubin"])
            name = function.fn.__name__
            if _serialised(compiled.asm["ptx"]):
                sys.exit(f"{name}: products are serialised")
            if name == "hopper_decode_kernel" and stack:
                sys.exit(f"{name}: {stack} bytes of stack")
            sys.stdout.write(f"{name} {options['num_warps']} {registers} {stack}\n")

    run = JITFunction.run
    JITFunction.run = compile_only


def _bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=BF16)


def compile_rows() -> None:
    """Norms, gates, sums over ranks, and what lies between projection and attention."""
    from layers.kernels.ordered_sum import ordered_sum
    from layers.kernels.peer import PeerExchange
    from layers.kernels.rowwise import gate_mul, qk_norm_rope_store, rms_norm
    from layers.rotary import Rotation
    from memory.kv_cache import KVLayer

    for width in (1024, 4096):
        x, weight = _bf16(40, width), _bf16(width)
        rms_norm(x, weight, 1e-6, pdl=True)
        rms_norm(x, weight, 1e-6, torch.zeros(4, 40, width), pdl=True)
        gate_mul(_bf16(40, 2 * width), pdl=True)
        for size in (2, 4, 8):
            device = torch.device("cpu")
            options: Any = {"rows": 256, "width": width, "dtype": BF16, "device": device}
            exchange = PeerExchange(rank=0, addresses=[0] * size, pdl=True, **options)
            exchange.add_rms_norm(_bf16(8, width), _bf16(8, width), weight, 1e-6)
            exchange.add_rms_norm(torch.zeros(2, 256, width), _bf16(256, width), weight, 1e-6)
            exchange.all_max(torch.zeros(8, dtype=torch.int64))
            ordered_sum(_bf16(size, 512, width), BF16)
    kv, table, ids = KVLayer.of(_bf16(4, 256, 2, 8, 128)), torch.zeros(64, 64), torch.zeros(40)
    rotation, weights = Rotation(ids.long(), table, table), (_bf16(128), _bf16(128))
    qk_norm_rope_store(_bf16(40, 32 * 128), weights, 1e-6, rotation, ids.long(), kv, pdl=True)


def compile_sampling() -> None:
    """Sampling, the bounds of filters, and log-probabilities."""
    from layers.kernels.logit_bounds import logit_bounds
    from layers.kernels.sampling import sample_shard
    from layers.kernels.scores import top_and_mass
    from layers.logits import Filters

    for rows in (1, 256):
        logits, column = _bf16(rows, 151_936), torch.zeros(rows)
        for least in (None, column):
            sample_shard(logits, column, column.long(), column.int(), least=least)
        logit_bounds(logits, Filters(column, column, column, column))
        top_and_mass(logits, column.long(), 5)


def compile_products() -> None:
    """Products of a few rows to many, of the shapes of Qwen3-0.6B and Qwen2-1.5B."""
    from layers.kernels.products import add_product, multiply, parts_of
    from layers.norm_rope import Scale

    for tokens in (1, 16, 32, 64, 128, 256, 300, 512, 4096):
        summands = 64 if tokens <= 16 else 1
        scale = Scale(torch.zeros(summands, tokens), 1024, 1e-6)
        x = _bf16(tokens, 1024)
        multiply(x, _bf16(4096, 1024), scale=scale, pdl=True)
        multiply(x, _bf16(2048, 1024), _bf16(2048), scale=scale, pdl=True)
        multiply(x, _bf16(6144, 1024), scale=scale, gate="silu", pdl=True)
        multiply(x, _bf16(6144, 1024), gate="gelu_tanh", pdl=True)
        if tokens <= 16:
            # As many sums of squares as hidden sizes of 4,096 and 8,192 have.
            for size in (4096, 8192):
                many = Scale(torch.zeros(size // 16, tokens), size, 1e-6)
                multiply(_bf16(tokens, size), _bf16(6144, size), scale=many, pdl=True)
                multiply(_bf16(tokens, size), _bf16(8192, size), scale=many, gate="silu", pdl=True)
        for n, k in ((1024, 3072), (1536, 8960)):
            parts = parts_of(n, k)
            multiply(_bf16(tokens, k), _bf16(n, k), parts=parts, partial=True, pdl=True)
            multiply(_bf16(tokens, k), _bf16(n, k), _bf16(n), parts=parts, pdl=True)
            if tokens <= 16:
                stream = _bf16(tokens, n), _bf16(n)
                add_product(_bf16(tokens, k), _bf16(n, k), None, *stream, parts=parts, pdl=True)


def compile_attention() -> None:
    """Paged attention of decode, few requests to many, and of prefill."""
    from layers.kernels.decode_launch import decode_workspace
    from layers.kernels.hopper_decode_launch import hopper_decode
    from layers.kernels.paged_decode import paged_decode
    from layers.kernels.paged_prefill import paged_prefill
    from layers.kernels.prefill_launch import hopper_prefill
    from memory.kv_cache import KVLayer

    tables = torch.zeros(256, 16, dtype=torch.int32)
    for kv_heads, dim in ((8, 128), (2, 64)):
        kv = KVLayer.of(_bf16(4, 256, 2, kv_heads, dim))
        sizes = (16, kv_heads, dim, 4096, 528)
        workspace = decode_workspace(torch.device("cpu"), *sizes)
        for batch, window in ((1, None), (24, None), (256, None), (1, 1000)):
            q, lens = _bf16(batch, 16, dim), torch.zeros(batch, dtype=torch.int32)
            about: Any = {"scale": 1.0, "workspace": workspace, "out": q, "max_context_len": 4096}
            paged_decode(q, kv, tables, lens, lens, **about, pdl=True, window=window)
        q, starts = _bf16(128, 16, dim), torch.zeros(9, dtype=torch.int32)
        where = (tables, starts[1:], starts, starts[1:])
        for window in (None, 1000):
            paged_prefill(q, kv, *where, scale=1.0, out=q, window=window)
        for page, window in ((16, None), (256, None), (16, 1000), (256, 1000)):
            kv = KVLayer.of(_bf16(4, page, 2, kv_heads, dim))
            hopper_prefill(q, kv, *where, scale=1.0, out=q, window=window)
            for batch in (1, 256):
                q, lens = _bf16(batch, 16, dim), torch.zeros(batch, dtype=torch.int32)
                options = 1.0, 4096, q, workspace, batch == 1, window
                hopper_decode(q, kv, tables, lens, lens, *options)


PARTS: dict[str, Callable[[], None]] = {
    "rows": compile_rows,
    "sampling": compile_sampling,
    "products": compile_products,
    "attention": compile_attention,
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        stand_in()
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()
