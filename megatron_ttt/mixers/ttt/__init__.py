"""Test-time training: a layer whose hidden state is a model, trained while the sequence is read.

`mixer.py` is what it says of itself, `layer.py` the megatron-core module and `scan.py` its inner
loop as a pure function of tensors. `linear/` and `mlp/` hold the inner models: the reference, which
reads like the maths, the fast form in PyTorch and the Triton kernels. `cpp/` holds the scan in C++
for both.
"""

from megatron_ttt.mixers.ttt.linear import LINEAR
from megatron_ttt.mixers.ttt.mixer import TTT
from megatron_ttt.mixers.ttt.mlp import MLP

TTT_LINEAR = TTT("ttt_linear", "TTT-Linear", LINEAR)
TTT_MLP = TTT("ttt_mlp", "TTT-MLP", MLP, warms_inner_lr=True)
