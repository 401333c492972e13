"""What generation carries from call to call, and where the tokens of a call stand.

Legend of the shape suffixes, in every file of this model: B batch, L tokens of this call, D hidden
size, H heads, F head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration_ttt import TTTConfig

Entry = dict[str, Tensor]
"""What one layer remembers, tensors [B, ...] by their names; nothing before it has read a token.
The pre-convolution keeps "conv" there, the mixer what it will need next by other names."""


class TTTCache:
    """What generation carries from call to call. Rows of a batch may be at different positions.

    It goes on from any position, but not back: there is no crop.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, config: TTTConfig):
        self.layers: list[Entry] = [{} for _ in range(config.num_hidden_layers)]
        self.columns = 0
        """Columns of the batch that were read, padding included."""
        self.position_B: Tensor | None = None
        """Tokens read in each row, on the CPU."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns read so far, padding included."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1: there is no longest sequence."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that `beam_idx` names, in its order."""
        self.position_B = self.position_B[beam_idx.cpu()]
        for entry in self.layers:
            for name, tensor in entry.items():
                # Layers may lie on several devices.
                entry[name] = tensor[beam_idx.to(tensor.device)]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(len(self.position_B), device="cpu").repeat_interleave(repeats)
        self.reorder_cache(rows)

    def crop(self, *_) -> None:
        """Refuse what assisted decoding asks of a cache."""
        raise ValueError("a TTTCache cannot go back: no assisted decoding")

    def memory_bytes(self) -> int:
        """Return the bytes of all tensors held."""
        return sum(t.numel() * t.element_size() for entry in self.layers for t in entry.values())


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

    def positions_BL(self) -> Tensor:
        """Return the positions, on the CPU; [1, L] where all rows agree."""
        start_B = self.start_B
        if (start_B == start_B[0]).all():
            start_B = start_B[:1]
        return start_B[:, None] + torch.arange(self.length, device="cpu")


def plan_span(
    h_BLD: Tensor, attention_mask: Tensor | None, cache: TTTCache | None
) -> tuple[Span, Tensor | None]:
    """Return where the tokens stand, and the order of columns that brings each row's padding last.

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
    """Return the columns of each row in the order given for it."""
    return h_BLD.gather(1, order_BL.to(h_BLD.device)[..., None].expand_as(h_BLD))


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
