"""The options of attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class AttentionOptions:
    """Options of attention."""

    window: int | None = None
    """Tokens that a token attends to, itself included; null: all before it."""
    num_kv_heads: int | None = None
    """Heads of keys and values, each shared by a group of query heads; null: as many as queries."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
