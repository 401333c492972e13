"""The TTT-Linear and TTT-MLP mixers (arXiv 2407.04620).

Where the package megatron_ttt is installed, its faster scan is used.

Shape suffixes as in cache_ttt.py.
"""

from functools import wraps
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_ttt import Entry, Span
from .configuration_ttt import TTTConfig
from .inner_loop_ttt import LN_EPS, linear_step, mlp_step, scan
from .layers_ttt import CausalConv, Mixer, read_tail, wide

try:
    from megatron_ttt.mixers.ttt.scan import INNER_MODELS, ttt_scan
except ImportError:
    ttt_scan = None
else:
    # torch.compile cannot trace through its own backward pass.
    ttt_scan = torch.compiler.disable(ttt_scan)


def without_autocast(method):
    """Autocast would compute in bfloat16 what is to be computed in float32 at least."""

    @wraps(method)
    def call(self, x: Tensor, *others):
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *others)

    return call


class TTTMixer(Mixer):
    """The sequence mixer, whose hidden state is a model trained while the sequence is read."""

    module_name = "seq_modeling_block"
    norm_names = ("seq_norm", "ffn_norm")
    inner_model: str | None
    """What the installed package's faster scan calls it: linear or mlp; None: it has none."""
    multiples: tuple[int, ...]
    """How many head sizes wide its input, hidden layer and output are."""

    def __init__(self, config: TTTConfig, layer_idx: int):
        super().__init__()
        self.options = config.mixer_options(layer_idx)
        D, H, K = config.hidden_size, config.num_attention_heads, self.options.mini_batch_size
        self.heads, self.size = H, D // H
        self.q_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        if self.options.share_qk:
            self.conv_q = CausalConv(D, self.options.conv_kernel)
            self.conv_k = CausalConv(D, self.options.conv_kernel)
        else:
            self.k_proj = nn.Linear(D, D, bias=False)
        if self.options.use_gate:
            self.g_proj = nn.Linear(D, D, bias=False)
        self.learnable_ttt_lr_weight = nn.Parameter(torch.zeros(H, 1, D))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.zeros(H, 1))
        self.learnable_token_idx = nn.Parameter(torch.zeros(K))
        self.ttt_norm_weight = nn.Parameter(torch.ones(H, self.size))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(H, self.size))
        self.state_names = []
        widths = [multiple * self.size for multiple in self.multiples]
        for i, (rows, columns) in enumerate(pairwise(widths), start=1):
            setattr(self, f"W{i}", nn.Parameter(torch.zeros(H, rows, columns)))
            setattr(self, f"b{i}", nn.Parameter(torch.zeros(H, 1, columns)))
            self.state_names += [f"W{i}", f"b{i}"]
        # What has gradients; a subclass may carry more from mini-batch to mini-batch.
        self.trained_names = list(self.state_names)
        self.post_norm = nn.LayerNorm(D, eps=LN_EPS)

    @staticmethod
    def step(q, x, v, lam, tau, gamma, beta, state, sums):
        """Return outputs and new gradient sums for tokens of one mini-batch."""
        raise NotImplementedError

    def close(self, state, steps):
        """Return the state after a whole mini-batch, whose summed gradient steps are given."""
        return tuple(W - step for W, step in zip(state, steps))

    @staticmethod
    def pre_conv_width(options) -> int | None:
        """Return the width of the convolution before the mixer, None for none."""
        return options.conv_kernel if options.pre_conv else None

    def init_parameter(self, name: str, parameter: Tensor, std: float) -> None:
        """Fill one of the mixer's own parameters as the paper does."""
        if name in ("W1", "W2", "learnable_ttt_lr_weight"):
            parameter.normal_(0.0, std)
        else:
            parameter.fill_(1.0 if name == "ttt_norm_weight" else 0.0)

    def forward(self, x_BLD: Tensor, span: Span, entry: Entry | None) -> Tensor:
        q = self.q_proj(x_BLD)
        if self.options.share_qk:
            tail = read_tail(entry, "conv_qk", q, self.options.conv_kernel, span)
            q, k = self.conv_q(q, tail), self.conv_k(q, tail)
        else:
            k = self.k_proj(x_BLD)
        q, k, v = (self._split_heads(x) for x in (q, k, self.v_proj(x_BLD)))
        angles = self._angles(span, x_BLD)
        out_BHLF = self._scan(
            rotate_pairs(q, *angles),
            rotate_pairs(k, *angles),
            v,
            self._inner_learning_rate(x_BLD),
            span,
            entry,
        )
        out_BLD = self.post_norm(out_BHLF.transpose(1, 2).flatten(2).to(x_BLD.dtype))
        if self.options.use_gate:
            out_BLD = F.gelu(self.g_proj(x_BLD), approximate="tanh") * out_BLD
        return self.o_proj(out_BLD)

    def _split_heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _angles(self, span: Span, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, L, F/2]: positions count within a mini-batch."""
        position = (span.positions_BL() % self.options.mini_batch_size).to(torch.float64)
        exponent = torch.arange(0, self.size, 2, dtype=torch.float64, device="cpu") / self.size
        angle = position[:, None, :, None] * self.options.rope_theta**-exponent
        return tuple(x.to(like.device, wide(like.dtype)) for x in (angle.cos(), angle.sin()))

    @without_autocast
    def _inner_learning_rate(self, x_BLD: Tensor) -> Tensor:
        """lam [B, H, L]: base * sigmoid(x . w + c) / F, in at least float32."""
        dtype = wide(x_BLD.dtype)
        weight, bias = self.learnable_ttt_lr_weight, self.learnable_ttt_lr_bias
        logits = F.linear(x_BLD.to(dtype), weight.squeeze(1).to(dtype), bias.squeeze(1).to(dtype))
        return self.options.base_lr / self.size * torch.sigmoid(logits).transpose(1, 2)

    def _token_scale(self, dtype: torch.dtype) -> Tensor:
        """tau [K]: max(1/i + delta_i, 0); 1/i is a float32 number, in float64 models too."""
        delta = self.learnable_token_idx
        index = torch.arange(1, len(delta) + 1, dtype=torch.float32, device=delta.device)
        return torch.clamp_min(index.reciprocal().to(dtype) + delta.to(dtype), 0.0)

    @without_autocast
    def _scan(self, q, k, v, lam, span: Span, entry: Entry | None) -> Tensor:
        """Return the outputs [B, H, L, F]; the entry moves on."""
        dtype = wide(torch.promote_types(q.dtype, self.W1.dtype))
        tau = self._token_scale(dtype)
        gamma, beta = self.ttt_norm_weight, self.ttt_norm_bias
        state = tuple(getattr(self, name) for name in self.state_names)
        faster = ttt_scan is not None and self.inner_model is not None
        if entry is None and faster:
            return ttt_scan(INNER_MODELS[self.inner_model], q, k, v, lam, tau, gamma, beta, state)[
                0
            ]

        given = q, k, v  # in their own dtype, which the kernels multiply in
        q, k, v, lam = (x.to(dtype) for x in (q, k, v, lam.unsqueeze(-1)))
        gamma, beta = (x.to(dtype).unsqueeze(-2) for x in (gamma, beta))
        state = tuple(W.to(dtype).expand(len(q), *W.shape) for W in state)
        sums = tuple(torch.zeros_like(W) for W in state[: len(self.trained_names)])
        if entry and "W1" in entry:
            state = tuple(entry[name] for name in self.state_names)
            sums = tuple(entry[f"sum_{name}"] for name in self.trained_names)
        K, L, outputs = len(tau), span.length, []
        if faster and not span.ragged and not (span.start_B % K).any() and L >= K:
            # Whole mini-batches from a mini-batch's start: nothing is summed up before or after.
            whole = L - L % K
            read = (x[:, :, :whole] for x in (*given, lam.squeeze(-1)))
            output, state = ttt_scan(
                INNER_MODELS[self.inner_model],
                *read,
                tau,
                gamma.squeeze(-2),
                beta.squeeze(-2),
                state,
            )
            outputs = [output.to(dtype)]
            q, k, v, lam = (x[:, :, whole:] for x in (q, k, v, lam))
            span = Span(span.start_B + whole, span.lengths_B - whole, L - whole)
        if span.length:
            output, state, sums = scan(self, q, k, v, lam, tau, gamma, beta, state, sums, span)
            outputs.append(output)
        output = torch.cat(outputs, dim=2)
        if entry is not None:
            entry.update(zip(self.state_names, state))
            entry.update((f"sum_{name}", S) for name, S in zip(self.trained_names, sums))
        return output


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [..., L, F] by the angles [..., L, F/2]."""
    even, odd = x[..., 0::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


# What the inner loop starts from is trained in float32, and stays so in a bf16 model.
_FP32 = (
    "learnable_ttt_lr_weight",
    "learnable_ttt_lr_bias",
    "learnable_token_idx",
    "ttt_norm_weight",
    "ttt_norm_bias",
)


class TTTLinear(TTTMixer):
    """The inner model is one linear layer."""

    inner_model = "linear"
    multiples = (1, 1)
    step = staticmethod(linear_step)
    fp32_names = (*_FP32, "W1", "b1")


class TTTMLP(TTTMixer):
    """The inner model is an MLP with one hidden layer, four times as wide."""

    inner_model = "mlp"
    multiples = (1, 4, 1)
    step = staticmethod(mlp_step)
    fp32_names = (*_FP32, "W1", "b1", "W2", "b2")
