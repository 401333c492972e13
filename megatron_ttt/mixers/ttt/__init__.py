"""Test-time training: a layer whose hidden state is a model, trained while the sequence is read.

`mixer.py` describes the mixers to the rest of the package; `layer.py` is the megatron-core module
and `scan.py` its inner loop as a pure function of tensors. `linear/` and `mlp/` hold the inner
models: the reference, which reads like the maths, the fast form in PyTorch and the Triton
kernels. `cpp/` holds the scan in C++ for both.
"""

from pathlib import Path

from megatron_ttt.mixers.hf_code import HFCode
from megatron_ttt.mixers.ttt.linear import LINEAR
from megatron_ttt.mixers.ttt.mixer import TTT
from megatron_ttt.mixers.ttt.mlp import MLP

_HERE = Path(__file__).parent
HF_FILES = (_HERE / "inner_loop_ttt.py", _HERE / "mixer_ttt.py")
"""Both layers in transformers."""


def _hf_code(class_name: str) -> HFCode:
    return HFCode(HF_FILES[1], class_name, needs=HF_FILES[:1])


TTT_LINEAR = TTT("ttt_linear", "TTT-Linear", LINEAR, _hf_code("TTTLinear"))
TTT_MLP = TTT("ttt_mlp", "TTT-MLP", MLP, _hf_code("TTTMLP"), warms_inner_lr=True)
