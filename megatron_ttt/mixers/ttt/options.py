"""The options of TTT mixers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TTTOptions:
    """Options of TTT-Linear and TTT-MLP. The paper's main model, on the Mamba backbone, has
    use_gate, share_qk and pre_conv; the one on the Transformer backbone has none of them."""

    use_gate: bool = True
    """Multiply the output by gelu of a projection of the input."""
    share_qk: bool = True
    """One projection for queries and keys, told apart by a causal convolution each."""
    pre_conv: bool = True
    """Begin the block with a causal convolution of the residual stream."""
    mini_batch_size: int = 16
    """Tokens K of one inner gradient step."""
    base_lr: float = 1.0
    """Inner learning rate before the gate; the paper uses 1.0 (Linear) and 0.1 (MLP)."""
    conv_kernel: int = 4
    """Width of the causal convolutions."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""

    @property
    def projections(self) -> tuple[str, ...]:
        """What the input is projected to, in the order in which in_proj packs it."""
        keys, gate = () if self.share_qk else ("k",), ("g",) if self.use_gate else ()
        return ("q", *keys, "v", *gate)
