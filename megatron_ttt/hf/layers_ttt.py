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
    """What a block reads the tokens before with: h += mixer(RMSNorm(h)).

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
        if isinstance(module, Mixer):
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
