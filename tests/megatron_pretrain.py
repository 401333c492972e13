"""Run megatron-core's own training loop on the CPU, on its mock data; arguments are Megatron's.

    python -O tests/megatron_pretrain.py --spec megatron_ttt.mixers ttt_linear_spec ...

Without -O, `pretrain` asserts that there is CUDA.
"""

from __future__ import annotations

from functools import partial

import torch

from megatron_ttt import platform as platforms

platforms.start("cpu")

import megatron.core.datasets.utils  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.optimizer import ParamGroupOverride, ParamKey  # noqa: E402
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer  # noqa: E402
from megatron.training import get_args, pretrain, training  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

# The wheel has the helpers compiled, but no Makefile.
megatron.core.datasets.utils.compile_helpers = lambda: None

standard = training.get_standard_config_overrides


def one_dtype_a_group(config):
    """Megatron's parameter groups, and one of the float32 parameters of a bf16 model."""
    return {**standard(config), ParamKey(attr="keep_fp32"): ParamGroupOverride(fp32=True)}


training.get_standard_config_overrides = one_dtype_a_group


def forward_step(batches, model):
    """Per-token losses of the next batch, and what to do with them."""
    batch = next(batches)
    inputs = (batch[key] for key in ("tokens", "position_ids", "attention_mask"))
    losses = model(*inputs, labels=batch["labels"])
    return losses, partial(masked_sum, batch["loss_mask"])


def masked_sum(mask, losses):
    """The sum of the losses, how many tokens it is of, and both to report."""
    loss, tokens = (losses.float() * mask).sum(), mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens])}


def datasets(samples):
    """Mock data for training, validation and test."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, samples, lambda: True, config).build()


if __name__ == "__main__":
    args = parse_and_validate_args()
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)
