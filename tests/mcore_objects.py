"""megatron-core's own objects, with nothing changed in them."""

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def own_optimizer(platform):
    """The distributed optimizer of a linear layer of two parameters, and the layer."""
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, **platform.core_overrides
    )
    module = nn.Linear(8, 8)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    chunk = DistributedDataParallel(config, ddp_config, module)
    options = OptimizerConfig(
        optimizer="adam", lr=0.1, weight_decay=0.5, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(options, [chunk])
    chunk.zero_grad_buffer()
    return optimizer, module
