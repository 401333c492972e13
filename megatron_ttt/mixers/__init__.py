"""Mixers: what stands in a block where attention stood. One folder each."""

from __future__ import annotations

from megatron_ttt.mixers.attention import ATTENTION
from megatron_ttt.mixers.base import Mixer
from megatron_ttt.mixers.registry import MIXERS, load_mixers, register_mixer
from megatron_ttt.mixers.ttt import TTT_LINEAR, TTT_MLP

DEFAULT_PATTERN = (TTT_LINEAR.name,)
"""The mixers of a model that names none."""

for _mixer in (TTT_LINEAR, TTT_MLP, ATTENTION):
    register_mixer(_mixer)

__all__ = [
    "ATTENTION",
    "DEFAULT_PATTERN",
    "MIXERS",
    "TTT_LINEAR",
    "TTT_MLP",
    "Mixer",
    "load_mixers",
    "register_mixer",
]
