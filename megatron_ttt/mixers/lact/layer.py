"""The LaCT mixer: a megatron-core self-attention submodule of fast weights and windowed attention.

Both read the same queries, keys and values. Fast head j spans the attention heads from j H/m on,
so tensor parallelism cuts both between the same columns. Legend: S tokens, B batch, D hidden size,
H attention heads and m fast heads of this rank, L tokens as the scan counts them (= S, gathered).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_ttt.layers.norm import rms_norm, statistics_dtype
from megatron_ttt.mixers.lact.inputs import fast_input, rotary_angles, rotate_halves
from megatron_ttt.mixers.lact.options import LaCTOptions
from megatron_ttt.mixers.lact.reference import NORM_EPS, reference_scan
from megatron_ttt.mixers.lact.scan import lact_scan
from megatron_ttt.mixers.module import MixerModule, split_heads
from megatron_ttt.ops.windowed_attention import windowed_attention

BASE_LR = 0.001
LR_SHIFT = BASE_LR + math.log(-math.expm1(-BASE_LR))
"""The inverse of softplus at the learning rate that a projection of 0 stands for."""
SCANS = {"auto": lact_scan, "torch": lact_scan, "naive": reference_scan}
"""The scan by `training.scan_backend`."""


class LaCTMixer(MixerModule):
    """LaCT in the place of self-attention."""

    def __init__(self, config, *arguments, **others):
        super().__init__(config, *arguments, **others)
        self.num_local_fast_heads = self.options.fast_heads // self.tp_group.size()

    @staticmethod
    def part_names(options: LaCTOptions) -> tuple[str, ...]:
        """Return queries, keys and values."""
        return ("q", "k", "v")

    def mix(self, x_SBD: Tensor, part: dict[str, Tensor]) -> Tensor:
        """Return the sum of what the attention and the fast weights answer."""
        q, k, v = part.values()
        if self.options.qk_norm:
            q, k = self.norm(q, self.q_norm_weight), self.norm(k, self.k_norm_weight)
        angles = rotary_angles(
            len(q), self.head_dim, self.options.rope_theta, statistics_dtype(q), q.device
        )
        return self.attend(q, k, v, angles) + self.run_fast_weights(x_SBD, q, k, v, angles)

    def norm(self, x_SBD: Tensor, weight_D: Tensor) -> Tensor:
        """RMSNorm over the hidden size, of which each TP rank has its heads' columns."""
        x = x_SBD.to(weight_D.dtype)
        squares = x.square().sum(-1, keepdim=True)
        # Each rank uses the sum, so its gradient is summed over the ranks too.
        squares = tensor_parallel.copy_to_tensor_model_parallel_region(
            tensor_parallel.reduce_from_tensor_model_parallel_region(squares, group=self.tp_group),
            group=self.tp_group,
        )
        mean = squares / self.config.hidden_size
        return (x * torch.rsqrt(mean + NORM_EPS) * weight_D).to(x_SBD.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Return the attention's output [S, B, columns of this rank]."""
        q, k, v = (split_heads(x, self.num_local_heads) for x in (q, k, v))
        q, k = rotate_halves(q, *angles), rotate_halves(k, *angles)
        out_BHLF = windowed_attention(q, k, v, self.options.window)
        return out_BHLF.permute(2, 0, 1, 3).flatten(2)

    def run_fast_weights(self, x_SBD, q, k, v, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Return the fast weights' output [S, B, columns of this rank], normalised and scaled."""
        options, heads = self.options, self.num_local_fast_heads
        q, k = (
            fast_input(
                part,
                heads,
                self.qk_scale[:, i],
                self.qk_offset[:, i],
                silu=options.silu,
                angles=angles if options.fast_rope else None,
            )
            for i, part in enumerate((q, k))
        )
        if options.silu and options.value_silu:
            v = F.silu(v)
        x_wide = x_SBD.to(self.lr_weight.dtype)
        # Rates are float32 numbers in the official models, in float64 ones too.
        lr = F.softplus(self.gate(x_wide, "lr").float() + LR_SHIFT)  # [B, L, 3 m]
        beta = None
        if options.momentum:
            beta = self.gate(x_wide, "momentum").sigmoid().float().transpose(1, 2).contiguous()
        out_BHLF = SCANS[self.scan_backend](
            q,
            k,
            split_heads(v, heads),
            lr.unflatten(-1, (heads, 3)).transpose(1, 2),
            beta,
            self.fast_weights(),
            chunk_size=options.chunk_size,
            muon=options.muon,
            pre_norm=options.pre_norm,
        )
        # The norm is replicated, but this rank's heads give only their share of its gradient.
        weight_F = tensor_parallel.copy_to_tensor_model_parallel_region(
            self.ttt_norm_weight, group=self.tp_group
        )
        out_BHLF = rms_norm(out_BHLF.to(weight_F.dtype), weight_F, NORM_EPS)
        if options.output_scale:
            scale_BLH = F.silu(self.gate(x_wide, "output_scale"))
            out_BHLF = out_BHLF * scale_BLH.transpose(1, 2).unsqueeze(-1)
        return out_BHLF.permute(2, 0, 1, 3).flatten(2).to(x_SBD.dtype)

    def gate(self, x_SBD: Tensor, name: str) -> Tensor:
        """Return a projection of the input to numbers of each fast head, [B, L, numbers]."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return F.linear(x_SBD, weight, bias).transpose(0, 1).contiguous()

    def fast_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return W0, W1 and W2 [m, ...] that a sequence starts from."""
        if not self.options.low_rank:
            return self.w0, self.w1, self.w2
        half = torch.eye(*self.w1.shape[:-3:-1], dtype=self.w1.dtype, device=self.w1.device) / 2
        W0, W2 = self.w0_left @ self.w0_right + half, self.w2_left @ self.w2_right + half
        return W0, self.w1, W2
