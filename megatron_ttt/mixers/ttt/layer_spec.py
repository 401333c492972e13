"""Whole transformer layers with a TTT mixer, for any model of megatron-core.

GPTModel(config, ttt_linear_spec, ...)
pretrain_gpt.py --spec megatron_ttt.mixers ttt_linear_spec ...
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_ttt.layers.block import block_spec
from megatron_ttt.mixers.ttt import TTT_LINEAR, TTT_MLP
from megatron_ttt.mixers.ttt.options import TTTOptions

MIXERS = {mixer.inner_model.name: mixer for mixer in (TTT_LINEAR, TTT_MLP)}
BASE_LR = {"linear": 1.0, "mlp": 0.1}
"""The paper's."""


def ttt_layer_spec(
    inner_model: str = "linear", *, scan_backend: str = "auto", **options: Any
) -> ModuleSpec:
    """Return the spec of a transformer layer: norms, TTT mixer, MLP and pre-conv.

    Sizes, the kind of MLP, initial standard deviation, dtype and parallelism are those of the
    TransformerConfig, whose `normalization` has to be RMSNorm.

    Args:
        inner_model: "linear" (TTT-Linear) or "mlp" (TTT-MLP).
        scan_backend: see `ttt_scan`.
        options: fields of `TTTOptions`, such as `pre_conv=False`; `base_lr` is the paper's unless
            it is given: 1.0 (Linear) or 0.1 (MLP).

    Raises:
        ValueError: unknown inner model.
        TypeError: unknown option.
    """
    if inner_model not in MIXERS:
        raise ValueError(f"unknown inner model {inner_model!r}: choose one of {', '.join(MIXERS)}")
    mixer = MIXERS[inner_model]
    chosen = TTTOptions(**{"base_lr": BASE_LR[inner_model], **options})
    return block_spec(mixer.spec(chosen, scan_backend), mixer.pre_conv_width(chosen))


ttt_linear_spec = ttt_layer_spec("linear")
"""A layer with TTT-Linear, its gate, shared projection of queries and keys, and pre-conv."""
ttt_mlp_spec = ttt_layer_spec("mlp")
"""The same with TTT-MLP."""
