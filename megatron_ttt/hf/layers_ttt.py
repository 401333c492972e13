"""What the block is made of, and what a mixer must be to stand in one.

A mixer's file holds a subclass of `Mixer`. It may import torch, transformers, this file,
cache_ttt.py and configuration_ttt.py, and those that its `HFCode` needs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_ttt import Entry, Span
from .configuration_ttt import TTTConfig


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute statistics and states in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class Mixer(nn.Module):
    """Mixes the tokens of a sequence within a block: h += mixer(RMSNorm(h)).

    `__init__` takes the configuration and the number of the layer, whose options
    `config.mixer_options(layer_idx)` returns.
    """

    module_name: str
    """Its name within the block, with which the names of its parameters begin."""
    norm_names: tuple[str, str]
    """Names of the norm before the mixer and of the one before the SwiGLU."""
    fp32_names: tuple[str, ...] = ()
    """Parameters that stay in float32 in a bf16 model."""

    def forward(self, x_BLD: Tensor, span: Span, entry: Entry | None) -> Tensor:
        """Return the outputs [B, L, D] of the tokens x [B, L, D], which stand where `span` says.

        entry: what the layer remembers of the tokens before, to be brought up to date; None
        where the tokens are whole sequences and nothing is to be remembered. Outputs at padding
        may be anything finite; padding must leave the entry and other outputs as they are.
        """
        raise NotImplementedError

    @staticmethod
    def pre_conv_width(options) -> int | None:
        """Return the width of the convolution before the mixer, None for none."""
        return None

    def init_parameter(self, name: str, parameter: Tensor, std: float) -> None:
        """Fill one of the mixer's own parameters; `init_weights` fills those of modules within it.

        std: that of the initial weights of linear layers.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how {name} starts")


class TTTRMSNorm(nn.Module):
    """x / rms(x) in at least float32, cast back, times a weight."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.rms_norm(x.to(wide(x.dtype)), x.shape[-1:], eps=self.eps)
        return normalised.to(x.dtype) * self.weight


class CausalConv(nn.Conv1d):
    """Depthwise causal convolution of tokens that come after others."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, channels, width, groups=channels)

    def forward(self, x_BLD: Tensor, tail_BWD: Tensor) -> Tensor:
        """tail_BWD: the last inputs before `x_BLD`, one less than the kernel is wide."""
        dtype = wide(x_BLD.dtype)
        padded = torch.cat([tail_BWD, x_BLD], dim=1).to(dtype)
        out = self.bias.to(dtype)
        for shift, weight_D in enumerate(self.weight.to(dtype).squeeze(1).t()):
            out = torch.addcmul(out, padded[:, shift : shift + x_BLD.shape[1]], weight_D)
        return out.to(x_BLD.dtype)


def read_tail(entry: Entry | None, name: str, x_BLD: Tensor, width: int, span: Span) -> Tensor:
    """Return the inputs before this call's, zeros at the start; the entry gets the next call's."""
    tail = entry.get(name) if entry is not None else None
    if tail is None:
        tail = x_BLD.new_zeros((len(x_BLD), width - 1, x_BLD.shape[-1]))
    if entry is not None:
        joined = torch.cat([tail, x_BLD], dim=1)
        index = span.lengths_B[:, None] + torch.arange(width - 1, device="cpu")
        index = index.to(x_BLD.device)[..., None].expand(-1, -1, x_BLD.shape[-1])
        entry[name] = joined.gather(1, index)
    return tail


def rotary_angles(
    span: Span,
    head_size: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
    angle_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B or 1, 1, L, F] of angles that are taken in `angle_dtype`."""
    exponent = torch.arange(0, head_size, 2, dtype=angle_dtype, device="cpu") / head_size
    position = span.positions_BL().to(angle_dtype)
    angle = position[:, None, :, None] * (1.0 / theta**exponent)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + F/2) of x [..., L, F] by the angles [..., L, F]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend(
    q: Tensor, k: Tensor, v: Tensor, span: Span, entry: Entry | None, window: int | None
) -> Tensor:
    """Return the causal attention's output [B, H, L, F] of rotated queries and keys.

    A token sees itself and the `window` - 1 tokens before it, or all of them where `window` is
    None. The entry keeps no more keys and values than those.
    """
    if entry and "keys" in entry:
        k = torch.cat([entry["keys"], k], dim=2)
        v = torch.cat([entry["values"], v], dim=2)
    if entry is not None:
        entry["keys"], entry["values"] = remembered(k, v, span, window)
    mask = visible_keys(span, k.shape[2], window)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else mask.to(q.device),
        is_causal=mask is None and span.length > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def remembered(k: Tensor, v: Tensor, span: Span, window: int | None) -> tuple[Tensor, Tensor]:
    """Return the keys and values that the next token will see, [B, heads, T, F].

    A row's last token is in the last column. T is window - 1, or the tokens of the longest row if
    those are fewer; a row that has fewer has anything in the columns before them.
    """
    end_B = span.start_B + span.lengths_B
    T = int(end_B.max())
    if window is not None:
        T = min(T, window - 1)
    before = k.shape[2] - span.length
    if not span.ragged:
        return (k, v) if k.shape[2] == T else (last_columns(k, T), last_columns(v, T))
    index_BT = (before + span.lengths_B - T)[:, None] + torch.arange(T, device="cpu")
    index = index_BT.clamp_min(0).to(k.device)[:, None, :, None]
    index = index.expand(-1, k.shape[1], -1, k.shape[3])
    return k.gather(2, index), v.gather(2, index)


def last_columns(x: Tensor, count: int) -> Tensor:
    """Return a copy of the last columns of x [B, H, T, F], which does not hold on to the others."""
    return x[:, :, x.shape[2] - count :].clone()


def visible_keys(span: Span, columns: int, window: int | None) -> Tensor | None:
    """Return which keys each token sees, [B or 1, 1, L, columns], on the CPU.

    None where it sees all those that are not after it. Tokens of a row come before its padding, so
    that causality keeps them from seeing any of this call.
    """
    before = columns - span.length
    # Relative to the position of the row's first token in this call.
    key = torch.arange(-before, span.length, device="cpu")
    query = torch.arange(span.length, device="cpu")[:, None]
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    visible = visible[None, None]
    if (span.start_B < before).any():
        visible = visible & (key + span.start_B[:, None] >= 0)[:, None, None]
    if span.length == 1:
        return None if visible.all() else visible
    return None if not before and columns <= (window or columns) else visible


class TTTPreConv(nn.Module):
    """The Mamba backbone's first branch: h + conv(RMSNorm(h))."""

    def __init__(self, config: TTTConfig, width: int):
        super().__init__()
        self.norm = TTTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.conv = CausalConv(config.hidden_size, width)

    def forward(self, h_BLD: Tensor, span: Span, entry: Entry | None) -> Tensor:
        x = self.norm(h_BLD)
        tail = read_tail(entry, "conv", x, self.conv.kernel_size[0], span)
        return h_BLD + self.conv(x, tail)


class TTTSwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TTTConfig):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@torch.no_grad()
def init_weights(module: nn.Module, std: float) -> None:
    """Give a module's own parameters the paper's initial values.

    Those that were loaded are left alone.
    """
    for name, parameter in module.named_parameters(recurse=False):
        if getattr(parameter, "_is_hf_initialized", False):
            continue
        if hasattr(module, "init_parameter"):
            module.init_parameter(name, parameter, std)
        elif isinstance(module, TTTRMSNorm | nn.LayerNorm):
            parameter.fill_(1.0 if name == "weight" else 0.0)
        elif name == "bias":
            parameter.zero_()
        elif isinstance(module, CausalConv):
            sigma = parameter.shape[-1] ** -0.5 / 0.87962566103423978
            nn.init.trunc_normal_(parameter, 0.0, sigma, -2 * sigma, 2 * sigma)
        else:
            parameter.normal_(0.0, std)
