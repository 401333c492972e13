"""The scan as fused Triton kernels, forward and backward. See `scan.py`."""
