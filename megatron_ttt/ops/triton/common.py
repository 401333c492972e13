"""What all kernels share."""

import triton

FMA = {"enable_fp_fusion": True}
"""To launch every kernel with: Triton's own default changes from one version to the next."""


def padded(width: int) -> int:
    """The power of two a tile of `width` takes."""
    return triton.next_power_of_2(width)
