"""Mixers: what stands in a block where attention stood. One folder each."""

from __future__ import annotations

from megatron_ttt.mixers.attention import ATTENTION
from megatron_ttt.mixers.base import Mixer
from megatron_ttt.mixers.ttt import TTT_LINEAR, TTT_MLP

MIXERS: dict[str, Mixer] = {mixer.name: mixer for mixer in (TTT_LINEAR, TTT_MLP, ATTENTION)}
"""Every mixer by its name in the configuration."""
