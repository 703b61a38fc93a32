"""Which kernels and hardware features a device supports."""

import functools

import torch


def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels can replace PyTorch operations for this device and dtype."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and has_triton()


def dependent_launch(device: torch.device) -> bool:
    """Whether the device can start a kernel before the stream's previous kernel has ended."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Whether kernels may use wgmma instructions, which compile only for Hopper GPUs."""
    return torch.cuda.get_device_capability(device)[0] == 9
