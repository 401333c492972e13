"""Softmax attention: the Transformer baseline's, and what hybrids have between other layers."""

from megatron_ttt.mixers.attention.mixer import Attention

ATTENTION = Attention()
