"""Operations that several mixers share, each as plain PyTorch and as a kernel.

`fused.py` says where the kernels, in `triton/`, run.
"""
