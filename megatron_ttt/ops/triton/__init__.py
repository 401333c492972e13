"""Fused Triton kernels, forward and backward."""
