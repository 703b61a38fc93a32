"""Which kernels and hardware features a device supports."""

import torch


def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused Triton kernels can run on this device with tensors of this dtype."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and has_triton()


def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before its predecessor ends: compute capability 9.0 or later."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def has_wgmma(device: torch.device) -> bool:
    """Whether the device has wgmma instructions: only compute capability 9.x has them."""
    # On any other device, compiling a kernel with wgmma makes LLVM abort the whole process.
    return torch.cuda.get_device_capability(device)[0] == 9
