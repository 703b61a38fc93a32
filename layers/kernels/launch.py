"""What the kernels of a device may use."""

import torch


def has_triton() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of this kind go through the fused kernels."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and has_triton()


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels may start before the one in front of them ends (compute capability 9.0)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def has_wgmma(device: torch.device) -> bool:
    """Whether the device has wgmma, which came with compute capability 9.0 and left with 10.0.

    For others a kernel with it does not compile: LLVM ends the process.
    """
    return torch.cuda.get_device_capability(device)[0] == 9
