"""What megatron-core offers to attention and a TTT layer cannot take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_ttt.errors import UserError

CURES = {
    "key_value_states": "it has no cross-attention; pass None",
    "inference_context": "it reads whole sequences; run the model without one",
    "inference_params": "it reads whole sequences; run the model without them",
    "packed_seq_params": "it would read on from one sequence into the next; give each sequence a "
    "row of the batch",
    "attention_bias": "it has no attention scores; pass None",
    "sequence_len_offset": "it reads whole sequences; pass None",
}
"""Arguments of megatron-core's attention that have to be None, and what to do."""

_causal_masks = WeakTensorKeyDictionary()


def refuse_config(config) -> None:
    """Raise `UserError` where a TransformerConfig asks for what TTT layers cannot do."""
    if config.context_parallel_size > 1:
        raise UserError(
            f"context_parallel_size={config.context_parallel_size}: TTT layers read a sequence in "
            "order, on one rank; set 1 (tensor and sequence parallelism work)"
        )
    if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
        raise UserError(
            f"normalization={config.normalization}, layernorm_zero_centered_gamma="
            f"{config.layernorm_zero_centered_gamma}: the norms of TTT layers are RMSNorm and "
            "False; set these"
        )


def refuse_arguments(**arguments) -> None:
    """Raise `UserError` for the first argument that is not None."""
    for name, value in arguments.items():
        if value is not None:
            raise UserError(f"{name} is not supported by TTT layers: {CURES[name]}")


def refuse_mask(mask: Tensor | None) -> None:
    """Raise `UserError` for a mask that is not causal.

    mask: None, or boolean [..., S, S], true where a query must not see a key. Looked at once: all
    layers get the same tensor, and the answer has to come from the device.
    """
    if mask is None or mask in _causal_masks:
        return
    future = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype != torch.bool or not torch.equal(mask, future.expand_as(mask)):
        raise UserError(
            "attention_mask is not the causal one, and TTT layers know no other: pass None, and "
            "leave resets at document ends out (--reset-attention-mask)"
        )
    _causal_masks[mask] = True
