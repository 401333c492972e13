"""LaCT: large-chunk test-time training of a SwiGLU, with attention within a window beside it.

`mixer.py` is what it says of itself, `layer.py` the megatron-core module, `scan.py` its inner loop
in large matrix products and `reference.py` the same as the paper writes it.
"""

from megatron_ttt.mixers.lact.mixer import LaCT

LACT = LaCT()
