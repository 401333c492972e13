"""Test-time training: a layer whose hidden state is a model, trained while the sequence is read.

`mixer.py` is what it says of itself, `layer.py` the megatron-core module and `scan.py` its inner
loop as a pure function of tensors. `linear/` and `mlp/` hold the inner models: the reference, which
reads like the maths, the fast form in PyTorch and the Triton kernels. `cpp/` holds the scan in C++
for both.
"""

from pathlib import Path

from megatron_ttt.mixers.hf_code import HFCode
from megatron_ttt.mixers.ttt.linear import LINEAR
from megatron_ttt.mixers.ttt.mixer import TTT
from megatron_ttt.mixers.ttt.mlp import MLP

HF_FILE = Path(__file__).parent / "mixer_ttt.py"
"""Both layers in transformers."""
TTT_LINEAR = TTT("ttt_linear", "TTT-Linear", LINEAR, HFCode(HF_FILE, "TTTLinear"))
TTT_MLP = TTT("ttt_mlp", "TTT-MLP", MLP, HFCode(HF_FILE, "TTTMLP"), warms_inner_lr=True)
