"""The options of LaCT."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LaCTOptions:
    """Options of LaCT; the defaults are those of the published models without Muon."""

    fast_heads: int = 4
    """Heads m of the fast weights; each spans num_heads / m attention heads."""
    hidden_multiple: int = 1
    """Hidden width of the fast weights as a multiple of their head's width."""
    chunk_size: int = 2048
    """Tokens C of one update of the fast weights."""
    window: int = 2048
    """Tokens that the attention sees, a token itself included."""
    momentum: bool = True
    """Carry the last update over into the next, by a learned share."""
    muon: bool = False
    """Orthogonalise each update with Newton-Schulz iterations."""
    low_rank: int | None = 32
    """Rank of the matrices that W0 and W2 start from; null: full matrices."""
    low_rank_gain: float = 0.5
    """Gain of the low-rank matrices' initial values."""
    pre_norm: bool = False
    """Add the updates up in an unnormalised copy of the fast weights; false: in the normalised
    weights themselves."""
    output_scale: bool = True
    """Scale the output of each fast head by a projection of the input."""
    silu: bool = True
    """Apply SiLU to the fast weights' queries, keys and values."""
    value_silu: bool = True
    """With `silu`, apply it to the values too."""
    fast_rope: bool = True
    """Rotate the fast weights' queries and keys as the attention's."""
    rope_theta: float = 1e6
    """Base of the rotary embedding."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values."""
    qk_norm: bool = False
    """Normalise queries and keys over the hidden size (RMSNorm)."""
