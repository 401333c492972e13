"""Fused Triton kernels, forward and backward: the scan (see `scan.py`), and what stands round it
(`conv_rotate.py`, `norm_conv.py`, `norm_gate.py`)."""
