"""Mixers: what stands in a block where attention stood. One folder each.

`ttt_linear_spec`, `ttt_mlp_spec` and `ttt_layer_spec` are whole transformer layers, for models of
megatron-core that are built by other programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ttt.mixers.attention import ATTENTION
from megatron_ttt.mixers.base import Mixer
from megatron_ttt.mixers.lact import LACT
from megatron_ttt.mixers.registry import MIXERS, check_known, load_mixers, register_mixer
from megatron_ttt.mixers.ttt import TTT_LINEAR, TTT_MLP

if TYPE_CHECKING:
    from megatron_ttt.mixers.ttt.layer_spec import ttt_layer_spec, ttt_linear_spec, ttt_mlp_spec

DEFAULT_PATTERN = (TTT_LINEAR.name,)
"""The mixers of a model that names none."""

for _mixer in (TTT_LINEAR, TTT_MLP, ATTENTION, LACT):
    register_mixer(_mixer)

__all__ = [
    "ATTENTION",
    "DEFAULT_PATTERN",
    "LACT",
    "MIXERS",
    "TTT_LINEAR",
    "TTT_MLP",
    "Mixer",
    "check_known",
    "load_mixers",
    "register_mixer",
    "ttt_layer_spec",
    "ttt_linear_spec",
    "ttt_mlp_spec",
]


def __getattr__(name: str):
    """Import a layer spec when it is asked for: it takes megatron-core, the tables here do not."""
    if name not in ("ttt_layer_spec", "ttt_linear_spec", "ttt_mlp_spec"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_ttt.mixers.ttt import layer_spec

    # Kept: after importing it, megatron-core's `--spec` looks in the module's dictionary.
    globals()[name] = getattr(layer_spec, name)
    return globals()[name]
