"""The scan through Triton kernels: what those of both inner models share."""
