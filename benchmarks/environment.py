"""What a run ran on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.engines import Setting

_PACKAGES = ("torch", "triton", "transformers", "vllm", "nano-vllm", "minisgl", "flash-attn")
# Runnable processes per core beyond which the figures of a CPU are said to be disturbed.
BUSY = 0.25


def environment(setting: Setting) -> dict[str, str]:
    """Names and values of what the figures depend on; take it before the run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    values = {
        "model": Path(setting.model).name,
        "dtype": setting.dtype,
        "device": _device(setting.device),
        "host": f"{_cpu_model()}, {cores} cores, {platform.system()}",
        "threads": str(setting.threads or torch.get_num_threads()),
        "load": _load(cores or 1),
        "KV cache": _kv_cache(setting),
        "Python": platform.python_version(),
    }
    values |= {package: found for package in _PACKAGES if (found := _version(package))}
    values["commit"] = _commit()
    return values


def _kv_cache(setting: Setting) -> str:
    if setting.kv_bytes is not None:
        return f"{setting.kv_bytes:,} bytes"
    return "0.9 of the device, all included" if setting.device == "cuda" else "each engine's own"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(device: str) -> str:
    if device != "cuda":
        return "CPU"
    driver = ""
    if smi := shutil.which("nvidia-smi"):
        driver = _output(smi, "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    name = torch.cuda.get_device_name()
    return f"{name}, CUDA {torch.version.cuda}, driver {driver or 'unknown'}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def _load(cores: int) -> str:
    if not hasattr(os, "getloadavg"):
        return "unknown"
    load = os.getloadavg()[0]
    if load > BUSY * cores:
        return f"{load:.1f} of other processes on {cores} cores: the machine was busy"
    return f"{load:.1f} on {cores} cores"


def _commit() -> str:
    root = Path(__file__).parents[1]
    name = _output("git", "-C", str(root), "rev-parse", "--short=10", "HEAD")
    if not name:
        return "unknown"
    dirty = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return name + (" with changes" if dirty else "")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
