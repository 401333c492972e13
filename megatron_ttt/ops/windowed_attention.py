"""Causal softmax attention over the last tokens or all of them, with grouped heads.

Legend: L tokens, B batch, H heads, G groups of heads that share keys and values, F features of a
head, W window, N blocks of C queries each, K keys that a block sees.
"""

from __future__ import annotations

from functools import cache
from math import ceil, sqrt

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# flex_attention has such windows too, but only compiled does it not materialise the scores, its
# backward does not run on CPUs, and a compiler would have to be where the model trains.

MIN_BLOCK = 64  # queries; so the fused kernels have enough to do in a block of a small window


def windowed_attention(
    q_BHLF: Tensor, k_BGLF: Tensor, v_BGLF: Tensor, window: int | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(F)) v, where each token attends to `window` tokens up to itself.

    Memory a token does not grow with L; under a window, nor does time. The scores are not
    materialised, except on CUDA in float64, for which PyTorch has no fused kernel.

    Args:
        q_BHLF: queries; floating point, of the same dtype as keys and values.
        k_BGLF, v_BGLF: keys and values. Head h uses group h // (H // G).
        window: number of tokens that a token attends to, itself included; None for all before it.

    Returns:
        [B, H, L, F] in the dtype of the inputs.

    Raises:
        ValueError: `window` is less than 1, or G does not divide H.
    """
    B, H, L, _ = q_BHLF.shape
    G = k_BGLF.shape[1]
    if H % G:
        raise ValueError(f"{H} heads cannot share {G} groups evenly")
    if window is not None and window < 1:
        raise ValueError(f"window={window} is too small: a token attends to itself at least")
    # Repeated: not every fused kernel of every supported PyTorch shares keys among heads.
    k_BHLF, v_BHLF = (
        x.unsqueeze(2).expand(-1, -1, H // G, -1, -1).flatten(1, 2) for x in (k_BGLF, v_BGLF)
    )
    if window is None or window >= L:
        return scaled_dot_product_attention(q_BHLF, k_BHLF, v_BHLF, is_causal=True)
    # Tokens first: then the blocks and their windows of keys, which overlap, are views.
    tokens_first = (x.permute(2, 0, 1, 3).flatten(1, 2) for x in (q_BHLF, k_BHLF, v_BHLF))
    return _in_blocks(*tokens_first, window).unflatten(1, (B, H)).permute(1, 2, 0, 3)


def windowed_attention_reference(
    q_BHLF: Tensor, k_BGLF: Tensor, v_BGLF: Tensor, window: int | None = None
) -> Tensor:
    """Return what `windowed_attention` returns, in float64, with all L x L scores."""
    H, L, F = q_BHLF.shape[1:]
    heads_per_group = H // k_BGLF.shape[1]
    q = q_BHLF.double()
    k, v = (x.double().repeat_interleave(heads_per_group, dim=1) for x in (k_BGLF, v_BGLF))
    i = torch.arange(L, device=q.device)[:, None]
    j = torch.arange(L, device=q.device)
    seen = j <= i
    if window is not None:
        seen &= i - window < j
    scores = (q @ k.mT / sqrt(F)).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def _in_blocks(q_LHF: Tensor, k_LHF: Tensor, v_LHF: Tensor, W: int) -> Tensor:
    """Attend within a window W < L: [L, H, F], where H counts the heads of all sequences.

    The first W tokens see all tokens before them. After them, a block of C queries sees W + C keys.
    That is C / W more than needed, and the gradient of overlapping keys takes (W + C) / C times the
    keys' memory before it is summed: a quarter of the window is a compromise.
    """
    C = max(ceil(W / 4), MIN_BLOCK)
    blocks, rest = divmod(len(q_LHF) - W, C)
    end = W + blocks * C
    q_first, q_blocks, q_rest = q_LHF.split([W, blocks * C, rest])
    mask_CK = _block_mask(C, W, q_LHF.dtype, q_LHF.device)
    outputs = [_attend(q_first[None], k_LHF[None, :W], v_LHF[None, :W])]
    if blocks:
        windows = (x[:end].unfold(0, W + C, C).permute(0, 3, 1, 2) for x in (k_LHF, v_LHF))
        outputs.append(_attend(q_blocks.unflatten(0, (blocks, C)), *windows, mask_CK))
    if rest:
        keys, values = (x[None, end - W :] for x in (k_LHF, v_LHF))
        outputs.append(_attend(q_rest[None], keys, values, mask_CK[:rest, : W + rest]))
    return torch.cat(outputs)


def _attend(
    q_NCHF: Tensor, k_NKHF: Tensor, v_NKHF: Tensor, mask_CK: Tensor | None = None
) -> Tensor:
    """Return the outputs [N * C, H, F] of N blocks under a mask; without one it is causal."""
    q, k, v = (x.transpose(1, 2) for x in (q_NCHF, k_NKHF, v_NKHF))
    out_NHCF = scaled_dot_product_attention(q, k, v, mask_CK, is_causal=mask_CK is None)
    return out_NHCF.transpose(1, 2).flatten(0, 1)


@cache
def _block_mask(C: int, W: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what is added to the scores [C, W + C] of a block and the W keys before it.

    It is kept, so that all layers save the same one for their backward passes. The kernels for CUDA
    copy a mask whose rows are not aligned to 16 elements.
    """
    K = W + C
    with torch.inference_mode(False):
        seen = torch.ones(C, ceil(K / 16) * 16, dtype=torch.bool, device=device).tril(W).triu(1)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~seen, -torch.inf)[:, :K]
