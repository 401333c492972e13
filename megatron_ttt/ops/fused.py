"""Whether what stands around the scan runs in one Triton kernel each, or as plain PyTorch."""

from importlib.util import find_spec

import torch
from torch import Tensor


def can_use_fused_kernels(x: Tensor) -> bool:
    """On CUDA, in bfloat16 or float32, where Triton is installed."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float32)
        and find_spec("triton") is not None
    )
