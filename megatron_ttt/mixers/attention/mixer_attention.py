"""The softmax attention mixer: Llama's, over all tokens before or over a window of them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_ttt import Entry, Span
from .configuration_ttt import TTTConfig
from .layers_ttt import Mixer


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
        cos, sin = self._angles(span, q)
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
        if entry and "keys" in entry:
            k = torch.cat([entry["keys"], k], dim=2)
            v = torch.cat([entry["values"], v], dim=2)
        if entry is not None:
            entry["keys"], entry["values"] = self.remembered(k, v, span)
        mask = self._mask(span, k.shape[2])
        out_BHLF = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask.to(q.device),
            is_causal=mask is None and span.length > 1,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.o_proj(out_BHLF.transpose(1, 2).flatten(2))

    def _angles(self, span: Span, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [B or 1, 1, L, F], of float32 angles as in transformers' Llama."""
        exponent = torch.arange(0, self.size, 2, dtype=torch.float32, device="cpu") / self.size
        position = span.positions_BL().to(torch.float32)
        angle = position[:, None, :, None] * (1.0 / self.rope_theta**exponent)
        angle = torch.cat([angle, angle], dim=-1)
        return tuple(x.to(like.device, like.dtype) for x in (angle.cos(), angle.sin()))

    def remembered(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the next token will see, [B, heads, T, F].

        A row's last token is in the last column. T is window - 1, or the tokens of the longest
        row if those are fewer; a row that has fewer has anything in the columns before them.
        """
        end_B = span.start_B + span.lengths_B
        T = int(end_B.max())
        if self.window is not None:
            T = min(T, self.window - 1)
        before = k.shape[2] - span.length
        if not span.ragged:
            return (k, v) if k.shape[2] == T else (last_columns(k, T), last_columns(v, T))
        index_BT = (before + span.lengths_B - T)[:, None] + torch.arange(T, device="cpu")
        index = index_BT.clamp_min(0).to(k.device)[:, None, :, None]
        index = index.expand(-1, k.shape[1], -1, k.shape[3])
        return k.gather(2, index), v.gather(2, index)

    def _mask(self, span: Span, columns: int) -> Tensor | None:
        """Return which keys each token sees, [B or 1, 1, L, columns], on the CPU.

        None where it sees all those that are not after it. Tokens of a row come before its padding,
        so that causality keeps them from seeing any of this call.
        """
        before = columns - span.length
        # Relative to the position of the row's first token in this call.
        key = torch.arange(-before, span.length, device="cpu")
        query = torch.arange(span.length, device="cpu")[:, None]
        visible = key <= query
        if self.window is not None:
            visible = visible & (key > query - self.window)
        visible = visible[None, None]
        if (span.start_B < before).any():
            visible = visible & (key + span.start_B[:, None] >= 0)[:, None, None]
        if span.length == 1:
            return None if visible.all() else visible
        return None if not before and columns <= (self.window or columns) else visible


def last_columns(x: Tensor, count: int) -> Tensor:
    """Return a copy of the last columns of x [B, H, T, F], which does not hold on to the others."""
    return x[:, :, x.shape[2] - count :].clone()


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + F/2) of x [..., L, F] by the angles [..., L, F]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
