"""TTT-Linear and TTT-MLP language models for transformers (arXiv 2407.04620).

This file and configuration_ttt.py stand beside the weights; torch and transformers are all they
need. Where the package megatron_ttt is installed, its faster scan is used.

Legend of the shape suffixes: B batch, L tokens of this call, D hidden size, H heads, F head size,
K mini-batch. Inside the scan tensors are [B, H, ...] and go by their names in the maths: W, b the
state at the start of a mini-batch, gW, gb the gradients summed since, x the keys.
"""

from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_ttt import TTTConfig

try:
    from megatron_ttt.mixers.ttt.scan import INNER_MODELS, ttt_scan
except ImportError:
    ttt_scan = None
else:
    # torch.compile cannot trace through its own backward pass.
    ttt_scan = torch.compiler.disable(ttt_scan)

LN_EPS = 1e-6


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute statistics and the inner model in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


# --- What is remembered of the tokens before


@dataclass
class LayerCache:
    """One layer's memory; its size does not depend on how many tokens were read."""

    state: tuple[Tensor, ...] | None = None
    """W, b (W1, b1, W2, b2) at the start of the current mini-batch, [B, H, ...]."""
    sums: tuple[Tensor, ...] | None = None
    """Their gradients, times the tokens' learning rates, summed over the current mini-batch."""
    tails: dict[str, Tensor] = field(default_factory=dict)
    """The last inputs of each causal convolution, [B, width - 1, D]."""


class TTTCache:
    """What generation carries from call to call. Rows of a batch may be at different positions.

    It goes on from any position, but not back: there is no crop.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, config: TTTConfig):
        self.layers = [LayerCache() for _ in range(config.num_hidden_layers)]
        self.columns = 0
        """Columns of the batch that were read, padding included."""
        self.position_B: Tensor | None = None
        """Tokens read in each row, on the CPU."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, padding included."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """There is no longest sequence."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that `beam_idx` names, in its order."""
        self.position_B = self.position_B[beam_idx.cpu()]
        for layer in self.layers:
            # Layers may lie on several devices.
            layer.state = tuple(t[beam_idx.to(t.device)] for t in layer.state)
            layer.sums = tuple(t[beam_idx.to(t.device)] for t in layer.sums)
            layer.tails = {name: t[beam_idx.to(t.device)] for name, t in layer.tails.items()}

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(len(self.position_B), device="cpu").repeat_interleave(repeats)
        self.reorder_cache(rows)

    def crop(self, *_) -> None:
        """What assisted decoding asks of a cache."""
        raise ValueError("a TTTCache cannot go back: no assisted decoding")

    def memory_bytes(self) -> int:
        """Bytes of all tensors held."""
        tensors = (
            t for c in self.layers for t in (*(c.state or ()), *(c.sums or ()), *c.tails.values())
        )
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Span:
    """Where this call's tokens stand. Each row's tokens come first, padding after them."""

    start_B: Tensor
    """Position of each row's first token, on the CPU."""
    lengths_B: Tensor
    """Tokens of each row, on the CPU."""
    length: int
    """Columns L."""

    @property
    def ragged(self) -> bool:
        """Whether some row is shorter than the others."""
        return bool((self.lengths_B != self.length).any())

    def positions_BL(self, mini_batch_size: int) -> Tensor:
        """Positions within the mini-batch; [1, L] where all rows agree."""
        start_B = self.start_B
        if (start_B == start_B[0]).all():
            start_B = start_B[:1]
        return (start_B[:, None] + torch.arange(self.length, device="cpu")) % mini_batch_size


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


def scan(q, k, v, lam, tau_K, gamma, beta, state, sums, span: Span):
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

    step = linear_step if len(state) == 2 else mlp_step
    outputs = []
    for start in range(0, q.shape[2], K):
        part = slice(start, start + K)
        tokens = (x[:, :, part] for x in (q, k, v, lam, tau_BN))
        output, sums = step(*tokens, gamma, beta, state, sums)
        outputs.append(output)
        closing_B = closing_BN[:, part].any(1)
        if closing_B.any():
            moved = closing_B.to(output)[:, None, None, None]
            state = tuple(W - moved * tau_K[-1] * S for W, S in zip(state, sums))
            sums = tuple((1 - moved) * S for S in sums)
    output = torch.cat(outputs, dim=2)
    if moved_over:
        output = gather_tokens(output, offset_B[:, None] + torch.arange(L, device="cpu"))
    return output, state, sums


def gather_tokens(x_BHLF: Tensor, index_BN: Tensor) -> Tensor:
    """[B, H, L, F] -> [B, H, N, F], each row's tokens of the indices given for it."""
    index = index_BN.to(x_BHLF.device)[:, None, :, None]
    return x_BHLF.gather(2, index.expand(*x_BHLF.shape[:2], -1, x_BHLF.shape[3]))


# --- Layers


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

    def __init__(self, config: TTTConfig):
        D = config.hidden_size
        super().__init__(D, D, config.conv_kernel, groups=D)

    def forward(self, x_BLD: Tensor, tail_BWD: Tensor) -> Tensor:
        """tail_BWD: the last inputs before `x_BLD`, one less than the kernel is wide."""
        dtype = wide(x_BLD.dtype)
        padded = torch.cat([tail_BWD, x_BLD], dim=1).to(dtype)
        out = self.bias.to(dtype)
        for shift, weight_D in enumerate(self.weight.to(dtype).squeeze(1).t()):
            out = torch.addcmul(out, padded[:, shift : shift + x_BLD.shape[1]], weight_D)
        return out.to(x_BLD.dtype)


def read_tail(cache: LayerCache | None, name: str, x_BLD: Tensor, width: int, span: Span) -> Tensor:
    """The inputs before this call's, zeros at the start; the cache gets the ones for the next."""
    tail = cache.tails.get(name) if cache is not None else None
    if tail is None:
        tail = x_BLD.new_zeros((len(x_BLD), width - 1, x_BLD.shape[-1]))
    if cache is not None:
        joined = torch.cat([tail, x_BLD], dim=1)
        index = span.lengths_B[:, None] + torch.arange(width - 1, device="cpu")
        index = index.to(x_BLD.device)[..., None].expand(-1, -1, x_BLD.shape[-1])
        cache.tails[name] = joined.gather(1, index)
    return tail


class TTTPreConv(nn.Module):
    """The Mamba backbone's first branch: h + conv(RMSNorm(h))."""

    def __init__(self, config: TTTConfig):
        super().__init__()
        self.norm = TTTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.conv = CausalConv(config)

    def forward(self, h_BLD: Tensor, span: Span, cache: LayerCache | None) -> Tensor:
        x = self.norm(h_BLD)
        tail = read_tail(cache, "conv", x, self.conv.kernel_size[0], span)
        return h_BLD + self.conv(x, tail)


def without_autocast(method):
    """Autocast would compute in bfloat16 what is to be computed in float32 at least."""

    @wraps(method)
    def call(self, x: Tensor, *others):
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *others)

    return call


class TTTMixer(nn.Module):
    """The sequence mixer, whose hidden state is a model trained while the sequence is read."""

    def __init__(self, config: TTTConfig):
        super().__init__()
        self.config = config
        D, H, K = config.hidden_size, config.num_attention_heads, config.mini_batch_size
        size = D // H
        self.q_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        if config.share_qk:
            self.conv_q, self.conv_k = CausalConv(config), CausalConv(config)
        else:
            self.k_proj = nn.Linear(D, D, bias=False)
        if config.use_gate:
            self.g_proj = nn.Linear(D, D, bias=False)
        self.learnable_ttt_lr_weight = nn.Parameter(torch.zeros(H, 1, D))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.zeros(H, 1))
        self.learnable_token_idx = nn.Parameter(torch.zeros(K))
        self.ttt_norm_weight = nn.Parameter(torch.ones(H, size))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(H, size))
        widths = (size, size) if config.ttt_layer_type == "linear" else (size, 4 * size, size)
        self.state_names = []
        for i, (rows, columns) in enumerate(pairwise(widths), start=1):
            setattr(self, f"W{i}", nn.Parameter(torch.zeros(H, rows, columns)))
            setattr(self, f"b{i}", nn.Parameter(torch.zeros(H, 1, columns)))
            self.state_names += [f"W{i}", f"b{i}"]
        if ttt_scan is not None:
            self.inner_model = INNER_MODELS[config.ttt_layer_type]
        self.post_norm = nn.LayerNorm(D, eps=LN_EPS)

    def forward(self, x_BLD: Tensor, span: Span, cache: LayerCache | None) -> Tensor:
        q = self.q_proj(x_BLD)
        if self.config.share_qk:
            tail = read_tail(cache, "conv_qk", q, self.config.conv_kernel, span)
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
            cache,
        )
        out_BLD = self.post_norm(out_BHLF.transpose(1, 2).flatten(2).to(x_BLD.dtype))
        if self.config.use_gate:
            out_BLD = F.gelu(self.g_proj(x_BLD), approximate="tanh") * out_BLD
        return self.o_proj(out_BLD)

    def _split_heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)

    def _angles(self, span: Span, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, L, F/2]: positions count within a mini-batch."""
        size = self.config.hidden_size // self.config.num_attention_heads
        position = span.positions_BL(self.config.mini_batch_size).to(torch.float64)
        exponent = torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size
        angle = position[:, None, :, None] * self.config.rope_theta**-exponent
        return tuple(x.to(like.device, wide(like.dtype)) for x in (angle.cos(), angle.sin()))

    @without_autocast
    def _inner_learning_rate(self, x_BLD: Tensor) -> Tensor:
        """lam [B, H, L]: base * sigmoid(x . w + c) / F, in at least float32."""
        dtype = wide(x_BLD.dtype)
        weight, bias = self.learnable_ttt_lr_weight, self.learnable_ttt_lr_bias
        logits = F.linear(x_BLD.to(dtype), weight.squeeze(1).to(dtype), bias.squeeze(1).to(dtype))
        size = self.config.hidden_size // self.config.num_attention_heads
        return self.config.ttt_base_lr / size * torch.sigmoid(logits).transpose(1, 2)

    def _token_scale(self, dtype: torch.dtype) -> Tensor:
        """tau [K]: max(1/i + delta_i, 0); 1/i is a float32 number, in float64 models too."""
        delta = self.learnable_token_idx
        index = torch.arange(1, len(delta) + 1, dtype=torch.float32, device=delta.device)
        return torch.clamp_min(index.reciprocal().to(dtype) + delta.to(dtype), 0.0)

    @without_autocast
    def _scan(self, q, k, v, lam, span: Span, cache: LayerCache | None) -> Tensor:
        """The outputs [B, H, L, F]; the cache moves on."""
        dtype = wide(torch.promote_types(q.dtype, self.W1.dtype))
        tau = self._token_scale(dtype)
        gamma, beta = self.ttt_norm_weight, self.ttt_norm_bias
        state = tuple(getattr(self, name) for name in self.state_names)
        if cache is None and ttt_scan is not None:
            return ttt_scan(self.inner_model, q, k, v, lam, tau, gamma, beta, state)[0]

        given = q, k, v  # in their own dtype, which the kernels multiply in
        q, k, v, lam = (x.to(dtype) for x in (q, k, v, lam.unsqueeze(-1)))
        gamma, beta = (x.to(dtype).unsqueeze(-2) for x in (gamma, beta))
        state = tuple(W.to(dtype).expand(len(q), *W.shape) for W in state)
        sums = tuple(torch.zeros_like(W) for W in state)
        if cache is not None and cache.state is not None:
            state, sums = cache.state, cache.sums
        K, L, outputs = len(tau), span.length, []
        if ttt_scan is not None and not span.ragged and not (span.start_B % K).any() and L >= K:
            # Whole mini-batches from a mini-batch's start: nothing is summed up before or after.
            whole = L - L % K
            read = (x[:, :, :whole] for x in (*given, lam.squeeze(-1)))
            output, state = ttt_scan(
                self.inner_model, *read, tau, gamma.squeeze(-2), beta.squeeze(-2), state
            )
            outputs = [output.to(dtype)]
            q, k, v, lam = (x[:, :, whole:] for x in (q, k, v, lam))
            span = Span(span.start_B + whole, span.lengths_B - whole, L - whole)
        if span.length:
            output, state, sums = scan(q, k, v, lam, tau, gamma, beta, state, sums, span)
            outputs.append(output)
        output = torch.cat(outputs, dim=2)
        if cache is not None:
            cache.state, cache.sums = state, sums
        return output


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [..., L, F] by the angles [..., L, F/2]."""
    even, odd = x[..., 0::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


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


class TTTDecoderLayer(GradientCheckpointingLayer):
    """h += preconv(h); h += TTT(RMSNorm(h)); h += SwiGLU(RMSNorm(h))."""

    def __init__(self, config: TTTConfig):
        super().__init__()
        if config.pre_conv:
            self.conv = TTTPreConv(config)
        self.seq_norm = TTTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.seq_modeling_block = TTTMixer(config)
        self.ffn_norm = TTTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = TTTSwiGLU(config)
        self.pre_conv = config.pre_conv

    def forward(self, h_BLD: Tensor, span: Span, cache: LayerCache | None = None) -> Tensor:
        if self.pre_conv:
            h_BLD = self.conv(h_BLD, span, cache)
        h_BLD = h_BLD + self.seq_modeling_block(self.seq_norm(h_BLD), span, cache)
        return h_BLD + self.mlp(self.ffn_norm(h_BLD))


# --- Models


class TTTPreTrainedModel(PreTrainedModel):
    """Loading, saving, initial weights."""

    config_class = TTTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("TTTDecoderLayer",)
    # Generation carries a TTTCache, which cannot be rolled back.
    _is_stateful = True

    def __init__(self, config: TTTConfig):
        super().__init__(config)
        # What the inner loop starts from is trained in float32, and stays so in a bf16 model.
        names = ["learnable_ttt_lr_weight", "learnable_ttt_lr_bias", "learnable_token_idx"]
        names += ["ttt_norm_weight", "ttt_norm_bias", "W1", "b1"]
        names += ["W2", "b2"] if config.ttt_layer_type == "mlp" else []
        self._keep_in_fp32_modules_strict = names

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The paper's initial weights; what was loaded is left alone."""
        std = self.config.initializer_range
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if isinstance(module, CausalConv) and name == "weight":
                sigma = parameter.shape[-1] ** -0.5 / 0.87962566103423978
                nn.init.trunc_normal_(parameter, 0.0, sigma, -2 * sigma, 2 * sigma)
            elif isinstance(module, nn.Linear | nn.Embedding) or name in (
                "W1",
                "W2",
                "learnable_ttt_lr_weight",
            ):
                parameter.normal_(0.0, std)
            else:
                norm = isinstance(module, TTTRMSNorm | nn.LayerNorm) or name == "ttt_norm_weight"
                parameter.fill_(1.0 if norm and name.endswith("weight") else 0.0)


class TTTModel(TTTPreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: TTTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TTTDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = TTTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: TTTCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids [B, L] -> last hidden state [B, L, D], and the cache for the tokens to come.

        attention_mask [B, L] or [B, tokens before + L]: 0 at padding, on either side. Padding
        leaves a row's state, convolutions and position as they are. position_ids say nothing that
        the mask does not; they are refused where they start anew within a row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        h_BLD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        cache = past_key_values
        check_cache(cache, len(h_BLD))
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:  # which would have moved on when a layer runs again
                raise ValueError(
                    "gradient checkpointing cannot go on from past_key_values: leave them out, or "
                    "call gradient_checkpointing_disable()"
                )
            use_cache = False
        if cache is None and use_cache:
            cache = TTTCache(self.config)
        span, order_BL = plan_span(h_BLD, attention_mask, cache)
        if position_ids is not None:
            refuse_packing(position_ids, attention_mask)
        if order_BL is not None:
            h_BLD = reordered(h_BLD, order_BL)

        hidden = []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden.append(h_BLD)
            h_BLD = layer(h_BLD, span, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.columns += span.length
            cache.position_B = span.start_B + span.lengths_B
        hidden.append(self.norm(h_BLD))
        if order_BL is not None:
            back_BL = order_BL.argsort(1)
            hidden = [reordered(h, back_BL) for h in hidden]
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden[-1],
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


def check_cache(cache: TTTCache | None, B: int) -> None:
    """Refuse a cache of another kind of model, and one that did not read these rows."""
    if cache is None:
        return
    if not isinstance(cache, TTTCache):
        raise ValueError(f"past_key_values is {type(cache)}: give {TTTCache}, or leave it out")
    if cache.position_B is not None and len(cache.position_B) != B:
        raise ValueError(
            f"past_key_values has read {len(cache.position_B)} rows: go on with as many, not {B}"
        )


def refuse_packing(position_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse several documents in a row: the state would go on from one to the next."""
    broken = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:  # at padding they may be anything
        held = attention_mask[:, -position_ids.shape[-1] :].bool()
        broken = broken & held[:, 1:] & held[:, :-1]
    if broken.any():
        raise ValueError(
            "position_ids do not count up by one within a row: packed documents are not "
            "supported, give each a row of its own"
        )


def plan_span(
    h_BLD: Tensor, attention_mask: Tensor | None, cache: TTTCache | None
) -> tuple[Span, Tensor | None]:
    """Where the tokens stand, and the order of columns that brings each row's padding last.

    The order is None where there is no padding.
    """
    B, L = h_BLD.shape[:2]
    start_B = torch.zeros(B, dtype=torch.long, device="cpu")
    if cache is not None and cache.position_B is not None:
        start_B = cache.position_B
    lengths_B = torch.full((B,), L, dtype=torch.long, device="cpu")
    order_BL = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[1] < L:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}: give [B, L] = {[B, L]}"
            )
        held_BL = attention_mask[:, -L:].bool()
        counts_B = held_BL.sum(1).cpu()
        if (counts_B != L).any():
            lengths_B = counts_B
            order_BL = (~held_BL).to(torch.uint8).argsort(dim=1, stable=True)
    return Span(start_B, lengths_B, L), order_BL


def reordered(h_BLD: Tensor, order_BL: Tensor) -> Tensor:
    """Columns of each row in the order given for it."""
    return h_BLD.gather(1, order_BL.to(h_BLD.device)[..., None].expand_as(h_BLD))


class TTTForCausalLM(TTTPreTrainedModel, GenerationMixin):
    """The language model; its head is the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TTTConfig):
        super().__init__(config)
        self.model = TTTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: TTTCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids [B, L] -> logits [B, L, V]; with labels [B, L] the next-token loss too.

        logits_to_keep: 0 for all positions, n for the last n. The rest as in `TTTModel`.
        """
        if return_dict is None:
            return_dict = self.config.return_dict
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if return_dict else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: TTTCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        use_cache: bool | None = True,
        **kwargs,
    ) -> dict:
        """The columns that the cache has not read yet.

        The ids may be all of a sequence, or those that are new to the cache; a mask is over all.
        transformers drops a mask of ones, and says how many columns are new, or that all are.
        """
        check_cache(past_key_values, len(input_ids))
        if past_key_values is None and use_cache:
            past_key_values = TTTCache(self.config)
        read = 0 if past_key_values is None else past_key_values.columns
        name, tokens = "input_ids", input_ids
        if inputs_embeds is not None and read < inputs_embeds.shape[1]:
            name, tokens = "inputs_embeds", inputs_embeds
        given = tokens.shape[1]
        if attention_mask is not None:
            new = attention_mask.shape[1] - read
        elif next_sequence_length is not None:
            new = next_sequence_length
        else:
            new = given if is_first_iteration else given - read
        if not 0 < new <= given <= new + read:
            raise ValueError(
                f"{name} has {given} columns, past_key_values has read {read}: give a sequence "
                "that is longer, or its new part and an attention_mask over the whole"
            )
        if attention_mask is not None:
            held = attention_mask[:, -new:].bool()
            if (held.any(1) & ~held[:, -1]).any():
                raise ValueError("attention_mask ends in padding: pad on the left to generate")
        return {
            name: tokens[:, -new:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_hidden_states": kwargs.get("output_hidden_states"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }


__all__ = ["TTTCache", "TTTForCausalLM", "TTTModel", "TTTPreTrainedModel"]
