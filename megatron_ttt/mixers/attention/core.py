"""Core attention of the attention mixer: causal, over all tokens or a window of the last ones."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_ttt.ops.windowed_attention import windowed_attention


class CausalAttention(nn.Module):
    """Takes the place of megatron-core's DotProductAttention; the scores are never materialised."""

    def __init__(self, config, window: int | None = None, **_):
        """Attend to `window` tokens, a token itself included, or to all before it (None)."""
        super().__init__()
        self.window = window

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask=None,
        packed_seq_params=None,
        **_,
    ) -> Tensor:
        """Return the attention's output [S, B, H * F]; it is causal whatever mask is passed.

        Args:
            query: [S, B, H, F].
            key, value: [S, B, G, F]; H // G heads share a group.

        Raises:
            ValueError: the sequences are packed, so their tokens would attend to each other's.
        """
        if packed_seq_params is not None:
            raise ValueError("packed_seq_params: packed sequences are not supported; pass None")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BHSF = windowed_attention(q, k, v, self.window)
        return out_BHSF.permute(2, 0, 1, 3).flatten(2)
