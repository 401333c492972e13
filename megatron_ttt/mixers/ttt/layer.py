"""The TTT mixer: a megatron-core self-attention submodule whose hidden state is a trained model.

The mathematics is in docs/mathematics.md (paper: arXiv 2407.04620, section 2). Everything between
the input and the output projection belongs to one head, except the post-norm, so heads are what
tensor parallelism cuts. Legend: S tokens, B batch, D hidden size, H heads of this rank, F head_dim,
L tokens as the scan counts them (= S, gathered), K mini-batch size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_ttt.layers.norm import PostNorm, statistics_dtype
from megatron_ttt.layers.parameters import ParameterHolder
from megatron_ttt.mixers.inner_loop import InnerLoop
from megatron_ttt.mixers.module import MixerModule, split_heads
from megatron_ttt.mixers.ttt.options import TTTOptions
from megatron_ttt.mixers.ttt.scan import ttt_scan
from megatron_ttt.mixers.ttt.statistics import inner_statistics
from megatron_ttt.ops.conv_rope import conv_rope
from megatron_ttt.ops.rope import mini_batch_angles, rotate_pairs

if TYPE_CHECKING:
    from megatron_ttt.mixers.ttt.inner_model import InnerModel


class TTTMixer(MixerModule, InnerLoop):
    """TTT-Linear or TTT-MLP in the place of self-attention; scan_backend: see `ttt_scan`."""

    def __init__(self, config, *arguments, **others):
        super().__init__(config, *arguments, **others)
        self.post_norm = PostNorm(config, config.hidden_size, tp_group=self.tp_group)
        for conv in ("conv_q", "conv_k") if self.options.share_qk else ():
            own = {name: self.table[f"{conv}.{name}"] for name in ("weight", "bias")}
            weights = {name: self.new_parameter(row) for name, row in own.items()}
            setattr(self, conv, ParameterHolder(**weights))
        self.state_names = list(self.mixer.inner_model.state_shapes(self.head_dim))

    @staticmethod
    def part_names(options: TTTOptions) -> tuple[str, ...]:
        """Return q, perhaps k, v, and perhaps the gate g."""
        return options.projections

    def mix(self, x_SBD: Tensor, part: dict[str, Tensor]) -> Tensor:
        """Return the scan's outputs, normalised and gated."""
        angles = mini_batch_angles(
            self.options.mini_batch_size,
            self.head_dim,
            self.options.rope_theta,
            statistics_dtype(x_SBD),
            x_SBD.device,
        )
        if self.options.share_qk:
            q, k = conv_rope(part["q"], [self.conv_q(), self.conv_k()], *angles)
        else:
            q, k = (
                rotate_pairs(split_heads(part[name], self.num_local_heads), *angles)
                for name in "qk"
            )
        inputs = (
            q,
            k,
            split_heads(part["v"], self.num_local_heads),
            self.inner_learning_rate(x_SBD),
            self.token_scale(),
            self.ttt_norm_weight,
            self.ttt_norm_bias,
            tuple(getattr(self, name) for name in self.state_names),
        )
        if self.observer is not None:
            cos, sin = angles
            unrotated = rotate_pairs(k, cos, -sin)
            self.observer(inner_statistics(self.inner_model(), *inputs[1:], unrotated))
        out_BHLF, _ = ttt_scan(self.inner_model(), *inputs, backend=self.scan_backend)
        out_SBD = out_BHLF.permute(2, 0, 1, 3).flatten(2)
        return self.post_norm(out_SBD, part.get("g"))

    def inner_model(self) -> InnerModel:
        """Return the model that the scan trains; a subclass may give it parameters of its own."""
        return self.mixer.inner_model

    def inner_learning_rate(self, x_SBD: Tensor) -> Tensor:
        """lam [B, H, L]: base * sigmoid(x . w + c) / f, in the gate's dtype (at least float32)."""
        weight_HD = self.learnable_ttt_lr_weight.squeeze(1)
        logits = F.linear(
            x_SBD.to(weight_HD.dtype), weight_HD, self.learnable_ttt_lr_bias.squeeze(1)
        )
        scale = self.options.base_lr * self.inner_lr_scale / self.head_dim
        return scale * torch.sigmoid(logits).permute(1, 2, 0)

    def token_scale(self) -> Tensor:
        """tau [K]: max(1/i + delta_i, 0).

        delta is replicated, but this rank's heads give only their share of its gradient: the copy
        region sums the shares. (megatron-core's attributes would average them, or do nothing.)
        """
        delta = tensor_parallel.copy_to_tensor_model_parallel_region(
            self.learnable_token_idx, group=self.tp_group
        )
        # 1/i is a float32 number in the official models, in float64 ones too.
        index = torch.arange(1, len(delta) + 1, dtype=torch.float32, device=delta.device)
        return torch.clamp_min(index.reciprocal().to(delta.dtype) + delta, 0.0)
