"""The block: megatron-core's transformer layer with our norms and, if wanted, a pre-conv first."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ttt.errors import UserError
from megatron_ttt.layers.conv import PreConv
from megatron_ttt.layers.norm import RMSNorm


class Block(TransformerLayer):
    """h += preconv(h), if there is one; h += mixer(RMSNorm(h)); h += MLP(RMSNorm(h)).

    pre_conv_width: of the pre-conv, a convolution of the residual stream; None for none.
    """

    def __init__(
        self,
        config,
        submodules,
        layer_number: int = 1,
        *,
        pre_conv_width: int | None = None,
        **kwargs,
    ):
        super().__init__(config, submodules, layer_number, **kwargs)
        self.pre_conv = None
        if pre_conv_width:
            self.pre_conv = PreConv(config, config.hidden_size, pre_conv_width, self.tp_group)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, context=None, **kwargs
    ):
        """[S, B, D] -> ([S, B, D], None), as TransformerLayer.

        Raises:
            UserError: there is a context, which only cross-attention could read.
        """
        if context is not None:
            raise UserError("a context is given, but the block has no cross-attention: pass None")
        if self.pre_conv is not None:
            hidden_states = self.pre_conv(hidden_states)
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


def block_spec(mixer: ModuleSpec, pre_conv_width: int | None = None) -> ModuleSpec:
    """Return the spec of a block around a mixer.

    The MLP is what the TransformerConfig says: a SwiGLU with `gated_linear_unit` and SiLU.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.module, spec.params = Block, {"pre_conv_width": pre_conv_width}
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention = mixer
    return spec
