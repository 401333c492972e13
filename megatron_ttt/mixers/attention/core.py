"""Core attention of the Transformer baseline: torch's scaled_dot_product_attention, causal."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """Takes the place of megatron-core's DotProductAttention; the scores are never materialised."""

    def __init__(self, config, **_):
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, **_
    ) -> Tensor:
        """query, key, value [S, B, H, F] -> [S, B, H*F]. The mask is causal whatever is passed."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BHSF = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out_BHSF.permute(2, 0, 1, 3).flatten(2)
