"""The softmax attention mixer: Llama's, over all tokens before or over a window of them."""

import torch
from torch import Tensor, nn

from .cache_ttt import Entry, Span
from .configuration_ttt import TTTConfig
from .layers_ttt import Mixer, attend, rotary_angles, rotate_halves


class Attention(Mixer):
    """Causal attention with rotary embeddings; groups of heads share their keys and values.

    A token sees itself and the `window` - 1 tokens before it, or all of them where `window` is
    None. No more keys and values than those are remembered.
    """

    module_name = "self_attn"
    norm_names = ("input_layernorm", "post_attention_layernorm")

    def __init__(self, config: TTTConfig, layer_idx: int):
        super().__init__()
        options = config.mixer_options(layer_idx)
        D, self.heads = config.hidden_size, config.num_attention_heads
        self.size = D // self.heads
        self.kv_heads = options.num_kv_heads or self.heads
        self.window, self.rope_theta = options.window, options.rope_theta
        if self.heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} does not divide {self.heads} heads")
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(D, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x_BLD: Tensor, span: Span, entry: Entry | None) -> Tensor:
        q, k, v = (
            projection(x_BLD).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Of float32 angles, as in transformers' Llama.
        angles = rotary_angles(span, self.size, self.rope_theta, q.device, q.dtype, torch.float32)
        q, k = rotate_halves(q, *angles), rotate_halves(k, *angles)
        out_BHLF = attend(q, k, v, span, entry, self.window)
        return self.o_proj(out_BHLF.transpose(1, 2).flatten(2))
