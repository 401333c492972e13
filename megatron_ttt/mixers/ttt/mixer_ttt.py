"""The TTT-Linear and TTT-MLP mixers (arXiv 2407.04620).

Where the package megatron_ttt is installed, its faster scan is used.

Shape suffixes as in cache_ttt.py, and K mini-batch, N slots. Inside the scan tensors are
[B, H, ...] and go by their names in the maths: W, b the state at the start of a mini-batch,
gW, gb the gradients summed since, x the keys.
"""

from functools import wraps
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_ttt import Entry, Span
from .configuration_ttt import TTTConfig
from .layers_ttt import CausalConv, Mixer, read_tail, wide

try:
    from megatron_ttt.mixers.ttt.scan import INNER_MODELS, ttt_scan
except ImportError:
    ttt_scan = None
else:
    # torch.compile cannot trace through its own backward pass.
    ttt_scan = torch.compiler.disable(ttt_scan)

LN_EPS = 1e-6


# --- The inner loop


def inner_gradient(Z, target, gamma, beta):
    """d/dZ of 1/2 ||gamma LN(Z) + beta - target||^2."""
    Z_hat, s = normalise(Z)
    u = gamma * (gamma * Z_hat + beta - target)
    return (u - u.mean(-1, keepdim=True) - Z_hat * (u * Z_hat).mean(-1, keepdim=True)) / s


def normalise(Z):
    """LayerNorm without its affine part, and the s it divides by."""
    centred = Z - Z.mean(-1, keepdim=True)
    s = (centred.square().mean(-1, keepdim=True) + LN_EPS).sqrt()
    return centred / s, s


def gelu_derivative(x):
    """gelu' of the tanh form, with sqrt(2/pi) rounded as in the official models."""
    c, a = 0.79788456, 0.044715
    t = torch.tanh(c * x * (1 + a * x * x))
    return x / 2 * (1 - t * t) * (c + 3 * a * c * x * x) + (1 + t) / 2


def updated_layer(q, x, G, eta, tau, W, b, gW, gb):
    """q through the layer (W, b) after the gradients of the mini-batch so far, for each token."""
    P = eta * (q @ x.mT + 1)
    return q @ W + b - tau * (q @ gW + gb) - P @ G


def added(x, G, lam, gW, gb):
    """The gradient sums with this call's tokens in them."""
    return gW + (lam * x).mT @ G, gb + (lam * G).sum(-2, keepdim=True)


def linear_step(q, x, v, lam, tau, gamma, beta, state, sums):
    """Outputs and new gradient sums of TTT-Linear, for tokens of one mini-batch."""
    W, b = state
    G = inner_gradient(x @ W + b, v - x, gamma, beta)
    Z = updated_layer(q, x, G, torch.tril(tau * lam.mT), tau, W, b, *sums)
    return q + gamma * normalise(Z)[0] + beta, added(x, G, lam, *sums)


def mlp_step(q, x, v, lam, tau, gamma, beta, state, sums):
    """Outputs and new gradient sums of TTT-MLP, for tokens of one mini-batch."""
    W1, b1, W2, b2 = state
    Z1 = x @ W1 + b1
    X2 = F.gelu(Z1, approximate="tanh")
    G2 = inner_gradient(X2 @ W2 + b2, v - x, gamma, beta)
    G1 = (G2 @ W2.mT) * gelu_derivative(Z1)
    eta = torch.tril(tau * lam.mT)
    X2bar = F.gelu(updated_layer(q, x, G1, eta, tau, W1, b1, *sums[:2]), approximate="tanh")
    Z2 = updated_layer(X2bar, X2, G2, eta, tau, W2, b2, *sums[2:])
    sums = added(x, G1, lam, *sums[:2]) + added(X2, G2, lam, *sums[2:])
    return q + gamma * normalise(Z2)[0] + beta, sums


def scan(mixer: "TTTMixer", q, k, v, lam, tau_K, gamma, beta, state, sums, span: Span):
    """Read tokens from any position on; rows may stand at different positions.

    q, k, v [B, H, L, F], lam [B, H, L, 1] with zeros at padding, tau_K [K], gamma and beta
    [H, 1, F]. Returns the outputs [B, H, L, F] and the new state and sums.

    The tokens are laid into slots of whole mini-batches. A slot without a token has lam 0, so it
    adds nothing to the sums; a row's state moves on where its last slot has one.
    """
    K, L = len(tau_K), span.length
    offset_B = span.start_B % K
    if L == 1:
        slots_BN = offset_B[:, None]
    else:
        slots = -(-(int(offset_B.max()) + L) // K) * K
        slots_BN = torch.arange(slots, device="cpu").expand(len(offset_B), -1)
    token_BN = slots_BN - offset_B[:, None]
    held_BN = (token_BN >= 0) & (token_BN < span.lengths_B[:, None])
    closing_BN = held_BN & (slots_BN % K == K - 1)
    moved_over = L > 1 and (offset_B.any() or slots_BN.shape[1] != L)
    if moved_over:
        index_BN = token_BN.clamp(0, L - 1)
        q, k, v, lam = (gather_tokens(x, index_BN) for x in (q, k, v, lam))
    lam = lam * held_BN.to(q.device)[:, None, :, None]
    tau_BN = tau_K[(slots_BN % K).to(q.device)][:, None, :, None]

    outputs = []
    for start in range(0, q.shape[2], K):
        part = slice(start, start + K)
        tokens = (x[:, :, part] for x in (q, k, v, lam, tau_BN))
        output, sums = mixer.step(*tokens, gamma, beta, state, sums)
        outputs.append(output)
        closing_B = closing_BN[:, part].any(1)
        if closing_B.any():
            moved = closing_B.to(output.device)[:, None, None, None]
            closed = mixer.close(state, tuple(tau_K[-1] * S for S in sums))
            state = tuple(torch.where(moved, new, W) for new, W in zip(closed, state))
            sums = tuple(torch.where(moved, 0, S) for S in sums)
    output = torch.cat(outputs, dim=2)
    if moved_over:
        output = gather_tokens(output, offset_B[:, None] + torch.arange(L, device="cpu"))
    return output, state, sums


def gather_tokens(x_BHLF: Tensor, index_BN: Tensor) -> Tensor:
    """[B, H, L, F] -> [B, H, N, F], each row's tokens of the indices given for it."""
    index = index_BN.to(x_BHLF.device)[:, None, :, None]
    return x_BHLF.gather(2, index.expand(*x_BHLF.shape[:2], -1, x_BHLF.shape[3]))


# --- The layer


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
