"""The LaCT mixer (arXiv 2505.23884): fast weights that learn a chunk of tokens at a time, and
attention within a window beside them.

Shape suffixes as in cache_ttt.py; F is the width of a fast head and M its hidden width, C a chunk.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_ttt import Entry, Span
from .configuration_ttt import TTTConfig
from .layers_ttt import Mixer, TTTRMSNorm, attend, rotary_angles, rotate_halves, wide

NORM_EPS = 1e-5
LR_SHIFT = 0.001 + math.log(-math.expm1(-0.001))
"""The inverse of softplus at 0.001."""
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
WEIGHTS = ("w0", "w1", "w2")


# --- The inner loop: tensors are [B, m, ...], and products are computed in the tokens' dtype.


def apply(x: Tensor, W0: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """Return W1 (silu(W0 x) * W2 x) of the rows of x."""
    W0, W1, W2 = (W.to(x.dtype) for W in (W0, W1, W2))
    return (F.silu(x @ W0.mT) * (x @ W2.mT)) @ W1.mT


def learning_step(k, v, lr, W0, W1, W2) -> list[Tensor]:
    """Return the sums over tokens of rate times gradient of <f(k), v>."""
    V0, V1, V2 = (W.to(k.dtype) for W in (W0, W1, W2))
    lr0, lr1, lr2 = lr.to(k.dtype).split(1, dim=-1)
    g, u = k @ V0.mT, k @ V2.mT
    d_hidden = v @ V1
    sigma = torch.sigmoid(g)
    silu = g * sigma
    d_silu = sigma + silu * (1 - sigma)
    steps = (
        (d_hidden * u * d_silu * lr0).mT @ k,
        v.mT @ (silu * u * lr1),
        (d_hidden * silu * lr2).mT @ k,
    )
    return [step.to(W.dtype) for step, W in zip(steps, (W0, W1, W2))]


def newton_schulz(G: Tensor) -> Tensor:
    """Return nearly the orthogonal part of G; in bfloat16 on CUDA, unless G is in float64."""
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if G.dtype != torch.float64 and G.is_cuda:
        X = X.bfloat16()
    is_tall = G.shape[-2] > G.shape[-1]
    X = X.mT if is_tall else X
    for p, q, r in NEWTON_SCHULZ:
        A = X @ X.mT
        X = p * X + (q * A + r * A @ A) @ X
    return (X.mT if is_tall else X).to(G.dtype)


# --- The layer


class LowRank(nn.Module):
    """A fast weight that starts as half the identity and a product of two small matrices."""

    def __init__(self, heads: int, rows: int, columns: int, rank: int, gain: float):
        super().__init__()
        self.w_left = nn.Parameter(torch.zeros(heads, rows, rank))
        self.w_right = nn.Parameter(torch.zeros(heads, rank, columns))
        self.gain = gain

    def forward(self) -> Tensor:
        rows, columns = self.w_left.shape[1], self.w_right.shape[2]
        half = torch.eye(rows, columns, dtype=self.w_left.dtype, device=self.w_left.device) / 2
        return self.w_left @ self.w_right + half

    def init_parameter(self, name: str, parameter: Tensor, std: float) -> None:
        """Fill one of the two matrices as the paper does."""
        parameter.normal_(0.0, self.gain * parameter.shape[-1] ** -0.5)


class LaCT(Mixer):
    """Attention within a window, plus fast weights that have learned from the chunks before."""

    module_name = "attn"
    norm_names = ("attn_norm", "mlp_norm")
    fp32_names = (
        "q_norm",
        "k_norm",
        "qk_scale",
        "qk_offset",
        "lr_proj",
        "momentum_proj",
        "ttt_scale_proj",
        *WEIGHTS,
        "ttt_norm",
    )

    def __init__(self, config: TTTConfig, layer_idx: int):
        super().__init__()
        self.options = options = config.mixer_options(layer_idx)
        D, m = config.hidden_size, options.fast_heads
        if config.num_attention_heads % m:
            raise ValueError(f"fast_heads={m} does not divide {config.num_attention_heads} heads")
        self.heads, self.size = m, D // config.num_attention_heads
        f = D // m
        h = options.hidden_multiple * f
        self.qkv = nn.Linear(D, 3 * D, bias=options.qkv_bias)
        if options.qk_norm:
            self.q_norm, self.k_norm = TTTRMSNorm(D, NORM_EPS), TTTRMSNorm(D, NORM_EPS)
        self.qk_scale = nn.Parameter(torch.ones(D, 2))
        self.qk_offset = nn.Parameter(torch.zeros(D, 2))
        self.lr_proj = nn.Linear(D, 3 * m)
        if options.momentum:
            self.momentum_proj = nn.Sequential(nn.Linear(D, m), nn.Sigmoid())
        if options.output_scale:
            self.ttt_scale_proj = nn.Linear(D, m)
        for name in ("w0", "w2"):
            if options.low_rank:
                setattr(self, name, LowRank(m, h, f, options.low_rank, options.low_rank_gain))
            else:
                setattr(self, name, nn.Parameter(torch.zeros(m, h, f)))
        self.w1 = nn.Parameter(torch.zeros(m, f, h))
        self.ttt_norm = TTTRMSNorm(f, NORM_EPS)
        self.o_proj = nn.Linear(D, D, bias=False)
        parts = ["", *(["main_"] if options.pre_norm else [])]
        parts += ["momentum_"] if options.momentum else []
        self.state_names = [part + name for part in parts for name in WEIGHTS]

    def init_parameter(self, name: str, parameter: Tensor, std: float) -> None:
        """Fill one of the mixer's own parameters as the paper does."""
        if name in WEIGHTS:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(1.0 if name == "qk_scale" else 0.0)

    def forward(self, x_BLD: Tensor, span: Span, entry: Entry | None) -> Tensor:
        q, k, v = self.qkv(x_BLD).chunk(3, dim=-1)
        if self.options.qk_norm:
            q, k = (norm(x).to(x.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        theta, dtype = self.options.rope_theta, wide(x_BLD.dtype)
        angles = rotary_angles(span, self.size, theta, x_BLD.device, dtype, torch.float64)
        fast_BLD = self._fast_weights(x_BLD, q, k, v, angles, span, entry)
        q, k, v = (x.unflatten(-1, (-1, self.size)).transpose(1, 2) for x in (q, k, v))
        q, k = (rotate_halves(x.to(dtype), *angles).to(x.dtype) for x in (q, k))
        out_BHLF = attend(q, k, v, span, entry, self.options.window)
        return self.o_proj(out_BHLF.transpose(1, 2).flatten(2) + fast_BLD)

    def _fast_weights(self, x_BLD, q, k, v, angles, span: Span, entry: Entry | None) -> Tensor:
        """Return the fast weights' output [B, L, D], normalised and scaled."""
        options, dtype = self.options, x_BLD.dtype
        with torch.autocast(x_BLD.device.type, enabled=False):
            q, k = (self._fast_input(x, i, angles) for i, x in enumerate((q, k)))
            v = F.silu(v) if options.silu and options.value_silu else v
            v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            x = x_BLD.to(self.lr_proj.weight.dtype)
            # Rates are float32 numbers in the official models, in float64 ones too.
            rates = F.softplus(self.lr_proj(x).float() + LR_SHIFT).unflatten(-1, (self.heads, 3))
            if options.momentum:
                rates = torch.cat([rates, self.momentum_proj(x).float().unsqueeze(-1)], dim=-1)
            out_BHLF = self._read([q, k, v, rates.transpose(1, 2)], span, entry)
            out_BHLF = self.ttt_norm(out_BHLF.to(self.ttt_norm.weight.dtype))
            if options.output_scale:
                scale_BLH = F.silu(self.ttt_scale_proj(x))
                out_BHLF = out_BHLF * scale_BLH.transpose(1, 2).unsqueeze(-1)
            return out_BHLF.transpose(1, 2).flatten(2).to(dtype)

    def _fast_input(self, x_BLD: Tensor, column: int, angles) -> Tensor:
        """Return the fast weights' queries (column 0) or keys (1), [B, m, L, F]."""
        scale, offset = self.qk_scale[:, column], self.qk_offset[:, column]
        x = x_BLD.to(scale.dtype) * scale + offset
        x = (F.silu(x) if self.options.silu else x).unflatten(-1, (self.heads, -1))
        x = (x / (x.norm(dim=-1, keepdim=True) + NORM_EPS)).transpose(1, 2)
        if self.options.fast_rope:
            cos, sin = (angle.unsqueeze(3) for angle in angles)
            x = rotate_halves(x.unflatten(-1, (-1, self.size)), cos, sin).flatten(3)
        return x.to(x_BLD.dtype)

    def _read(self, tokens: list[Tensor], span: Span, entry: Entry | None) -> Tensor:
        """Return the outputs [B, m, L, F] of queries; the entry moves on.

        tokens: queries, keys, values and rates [B, m, L, ...]. Rows that stand at the same place of
        a chunk, and have as many tokens, are read together.
        """
        q = tokens[0]
        B, C = len(q), self.options.chunk_size
        state, opened = self._remembered(tokens, entry)
        norms = [W.norm(dim=-1, keepdim=True) for W in self._start(wide(q.dtype))]
        groups: dict[tuple[int, int], list[int]] = {}
        for row, place in enumerate(zip((span.start_B % C).tolist(), span.lengths_B.tolist())):
            groups.setdefault(place, []).append(row)
        parts = []
        for (held, length), rows in groups.items():
            index = torch.tensor(rows, device=q.device)
            own = [x if len(groups) == 1 else x[index] for x in (*tokens, *opened, *state)]
            own = [x[:, :, :length] for x in own[:4]], [x[:, :, :held] for x in own[4:7]], own[7:]
            parts.append((index, *self._read_together(*own, norms, keep=entry is not None)))
        whole = len(parts) == 1
        output = _merged([(index, out) for index, out, *_ in parts], B, q.shape[2])
        if entry is not None:
            for i, name in enumerate(("chunk_k", "chunk_v", "chunk_rates")):
                kept = [(index, opened[i]) for index, _, opened, _ in parts]
                entry[name] = _merged(kept, B, max(x.shape[2] for _, x in kept))
            for i, name in enumerate(self.state_names):
                states = [(index, state[i]) for index, *_, state in parts]
                rows = states[0][1].shape[2]
                entry[name] = states[0][1] if whole else _merged(states, B, rows)
        return output

    def _remembered(self, tokens: list[Tensor], entry: Entry | None):
        """Return the state, and keys, values and rates of the chunk that is not learned yet."""
        if entry and "w0" in entry:
            names = ("chunk_k", "chunk_v", "chunk_rates")
            return [entry[name] for name in self.state_names], [entry[name] for name in names]
        W = [W.expand(len(tokens[0]), *W.shape) for W in self._start(wide(tokens[0].dtype))]
        state = W + W * self.options.pre_norm
        state += [torch.zeros_like(w) for w in W] * self.options.momentum
        return state, [x[:, :, :0] for x in tokens[1:]]

    def _start(self, dtype: torch.dtype) -> list[Tensor]:
        """Return W0, W1 and W2 [m, ...] that a sequence starts from."""
        W0, W2 = (self.w0(), self.w2()) if self.options.low_rank else (self.w0, self.w2)
        return [W.to(dtype) for W in (W0, self.w1, W2)]

    def _read_together(self, tokens, opened, state, norms, keep: bool):
        """Return outputs, the chunk that is open after the tokens, and the state.

        keep: whether tokens may follow; without them the last chunk is not learned from.
        """
        q, *learned = tokens
        C, outputs, start = self.options.chunk_size, [q[:, :, :0]], 0
        while start < q.shape[2]:
            part = slice(start, start + C - opened[0].shape[2])
            outputs.append(apply(q[:, :, part], *state[:3]))
            opened = [torch.cat([x, new[:, :, part]], dim=2) for x, new in zip(opened, learned)]
            start = part.stop
            if opened[0].shape[2] == C and (keep or start < q.shape[2]):
                state = self._learn(*opened, state, norms)
                opened = [x[:, :, :0] for x in opened]
        return torch.cat(outputs, dim=2), opened, state

    def _learn(self, k, v, rates, state, norms) -> list[Tensor]:
        """Return the state after a chunk."""
        W, options = state[:3], self.options
        dW = learning_step(k, v, rates[..., :3], *W)
        if options.momentum:
            share = rates[..., 3].contiguous().mean(-1)[..., None, None]
            dW = [d + share * M for d, M in zip(dW, state[-3:])]
        moments = dW if options.momentum else []
        if options.muon:
            dW = [newton_schulz(d) for d in dW]
        main = [w + d for w, d in zip(state[3:6] if options.pre_norm else W, dW)]
        W = [w / (w.norm(dim=-1, keepdim=True) + NORM_EPS) * n for w, n in zip(main, norms)]
        return [*W, *(main if options.pre_norm else []), *moments]


def _merged(parts: list[tuple[Tensor, Tensor]], B: int, length: int) -> Tensor:
    """Put the rows of parts [rows, m, at most `length`, ...] together; zeros fill them up."""
    _, first = parts[0]
    if len(parts) == 1 and first.shape[2] == length:
        return first
    merged = first.new_zeros((B, first.shape[1], length, *first.shape[3:]))
    for index, part in parts:
        merged[index, :, : part.shape[2]] = part
    return merged
