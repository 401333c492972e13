"""Train a GPTModel with TTT layers on the bytes of a file: megatron-core's parts and a layer spec.

    torchrun --nproc-per-node 2 examples/megatron_lm/train.py --tensor-parallel 2

Runs on GPUs, or on a CPU where there is none. Prints the loss of each step.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_ttt import platform as platforms

SEQ_LENGTH, MICRO_BATCH = 128, 4


def main() -> None:
    """Build, train, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path(__file__), help="what to learn")
    parser.add_argument("--spec", default="ttt_linear_spec", help="or ttt_mlp_spec")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()

    # Before megatron-core is imported: where there is no GPU, this gives it a CPU.
    platform = platforms.start()
    platforms.start_process_group(platform)
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ttt import mixers

    parallel_state.initialize_model_parallel(args.tensor_parallel)
    platforms.seed_everything(0)
    sizes = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4}
    layout = {"tensor_model_parallel_size": args.tensor_parallel}
    swiglu = {"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False}
    others = {"normalization": "RMSNorm", "hidden_dropout": 0.0, **platform.core_overrides}
    config = TransformerConfig(**sizes, **layout, **swiglu, **others)
    spec = getattr(mixers, args.spec)
    model = GPTModel(config, spec, 256, SEQ_LENGTH, position_embedding_type="none")
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp, model.to(platform.device))
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, weight_decay=0.1), [model])

    text = torch.tensor(list(args.text.read_bytes()), device=platform.device)
    random = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())

    def forward_step(_, model):
        starts = torch.randint(len(text) - SEQ_LENGTH, (MICRO_BATCH,), generator=random)
        windows = torch.stack([text[start : start + SEQ_LENGTH + 1] for start in starts.tolist()])
        losses = model(windows[:, :-1], None, None, labels=windows[:, 1:])
        return losses, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})

    for step in range(1, args.steps + 1):
        model.zero_grad_buffer()
        (reported,) = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[model],
            num_microbatches=1,
            seq_length=SEQ_LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        optimizer.step()
        if torch.distributed.get_rank() == 0:
            print(f"step {step} loss {reported['loss'].item():.4f}", flush=True)


if __name__ == "__main__":
    main()
