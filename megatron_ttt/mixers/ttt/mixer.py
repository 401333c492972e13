"""What a TTT mixer says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ttt.mixers.base import Dimensions, Microbatch, Mixer, Parameter
from megatron_ttt.mixers.ttt import cost
from megatron_ttt.mixers.ttt.inner_model import InnerModel
from megatron_ttt.mixers.ttt.options import TTTOptions
from megatron_ttt.mixers.ttt.parameters import ttt_parameters

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class TTT(Mixer):
    """A layer whose hidden state is an inner model (arXiv 2407.04620)."""

    hf_norms = ("seq_norm", "ffn_norm")
    Options = TTTOptions

    def __init__(self, name: str, label: str, inner_model: InnerModel):
        self.name, self.label, self.inner_model = name, label, inner_model

    def pre_conv_width(self, options: TTTOptions) -> int | None:
        """Return the width of the pre-conv, None where the block has none."""
        return options.conv_kernel if options.pre_conv else None

    def parameters(self, dims: Dimensions, options: TTTOptions) -> list[Parameter]:
        """Return the table of the mixer's parameters."""
        return ttt_parameters(self.inner_model, dims, options)

    def flops_per_token(self, dims: Dimensions, options: TTTOptions, seq_length: int) -> float:
        """Return the FLOPs of a token's forward pass."""
        return cost.flops_per_token(self.inner_model, dims, options)

    def saved_bytes(self, options: TTTOptions, batch: Microbatch) -> list[float]:
        """Return the bytes of each tensor saved, but for the scan's."""
        return cost.saved_bytes(options, batch)

    def saved_state_bytes(self, options: TTTOptions, batch: Microbatch) -> float:
        """Return the bytes that the scan saves."""
        return cost.saved_state_bytes(self.inner_model, options, batch)

    def sent_bytes(self, options: TTTOptions, batch: Microbatch) -> float:
        """Return the bytes that tensor parallelism gathers and reduces."""
        return cost.sent_bytes(batch)

    def spec(self, options: TTTOptions, backend: str = "auto") -> ModuleSpec:
        """Return the spec of the mixer; backend: see `ttt_scan`."""
        from megatron_ttt.mixers.ttt.layer import ttt_mixer_spec

        return ttt_mixer_spec(self.inner_model, options, backend)
