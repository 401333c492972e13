"""Train one model on two ranks: the trainer's own, or a GPTModel that knows nothing of the trainer.

    torchrun --nproc-per-node 2 tests/plain_gpt_model.py trainer FOLDER
    torchrun --nproc-per-node 2 tests/plain_gpt_model.py plain FOLDER

Each rank writes FOLDER/SIDE-RANK.pt. `trainer` comes first: `plain` starts from its weights. Both
make five steps of AdamW, of torch's, on the same tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

SIZES = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 176}
HEADS, VOCABULARY, TOKENS, STEPS = 4, 96, 40, 5


def main() -> None:
    """Run one side."""
    side, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    from megatron_ttt import platform as platforms

    platform = platforms.start("cpu")
    platforms.start_process_group(platform)
    written = SIDES[side](folder, platform)
    torch.save(written, folder / f"{side}-{dist.get_rank()}.pt")


def trainer_side(folder: Path, platform) -> dict:
    """The trainer's chunk, its weights as the seed gives them."""
    from megatron.core import parallel_state

    from megatron_ttt.config import load_config
    from megatron_ttt.model import build_chunks, initialise_weights, make_transformer_config
    from megatron_ttt.platform import seed_everything
    from megatron_ttt.stack import architecture_of

    sizes = [f"model.{key}={value}" for key, value in SIZES.items()]
    sizes += [f"model.num_heads={HEADS}", f"model.vocab_size={VOCABULARY}"]
    layout = ["parallel.tensor_model_parallel_size=2", f"training.seq_length={TOKENS}"]
    config = load_config(["yaml_recipes/debug_cpu.yaml"], [*sizes, *layout])
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    seed_everything(0)
    (chunk,) = build_chunks(config, make_transformer_config(config, platform))
    initialise_weights(chunk, architecture_of(config), seed=0)
    start = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    return {"start": start, **five_steps(chunk)}


def plain_side(folder: Path, platform) -> dict:
    """GPTModels of megatron-core's own configuration, with the layer as `--spec` imports it."""
    from megatron.core import parallel_state
    from megatron.core.transformer.spec_utils import import_module
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron_ttt.layers.norm import RMSNorm

    spec = import_module(("megatron_ttt.mixers", "ttt_linear_spec"))
    # Without Transformer Engine, megatron-core's last norm knows no sequence parallelism.
    block = TransformerBlockSubmodules([spec] * SIZES["num_layers"], RMSNorm)
    # Where each of the two ranks is alone in the global group, all has to come from the given one.
    parallel_state.initialize_model_parallel()
    groups = lone_groups()
    model = load(build(platform, block, groups, sequence_parallel=True), folder)
    written = {"own_group": five_steps(model, groups.tp)}
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    written["plain"] = five_steps(load(build(platform, spec), folder))
    model = load(build(platform, block, sequence_parallel=True, **RECOMPUTED), folder)
    written["sequence_parallel"] = five_steps(model)
    for name, on_cpu in (("drawn_whole", True), ("drawn_in_parts", False)):
        model = build(platform, spec, use_cpu_initialization=on_cpu)
        written[name] = {key: p.detach().clone() for key, p in model.named_parameters()}
        written["cut"] = {key: p.tensor_model_parallel for key, p in own_parameters(model)}
    written["imported"] = sorted(name for name in sys.modules if name.startswith("megatron_ttt"))
    return written


RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def build(platform, spec, groups=None, **options):
    """A GPTModel at TP2."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ttt.platform import seed_everything

    seed_everything(0)
    config = TransformerConfig(
        **{
            **SIZES,
            "num_attention_heads": HEADS,
            "tensor_model_parallel_size": 2,
            "normalization": "RMSNorm",
            "layernorm_epsilon": 1e-6,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            **platform.core_overrides,
            **options,
        }
    )
    return GPTModel(
        config,
        spec,
        VOCABULARY,
        TOKENS,
        position_embedding_type="none",
        share_embeddings_and_output_weights=True,
        parallel_output=groups is None,
        pg_collection=groups,
    )


def lone_groups():
    """Process groups of which that of tensor parallelism has both ranks, the others one each."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.tp = groups.mp = groups.tp_cp = dist.new_group([0, 1])
    groups.dp = groups.dp_cp = groups.pp
    return groups


def own_parameters(model):
    """The parameters that our modules make, not megatron-core's linear layers, which have theirs
    from the configuration's init_method."""
    for name, parameter in model.decoder.layers.named_parameters():
        if not name.endswith(("proj.weight", "linear_fc1.weight", "linear_fc2.weight")):
            yield f"decoder.layers.{name}", parameter


def load(model, folder: Path):
    """Give a model the weights that the trainer's began with."""
    start = torch.load(folder / f"trainer-{dist.get_rank()}.pt")["start"]
    model.load_state_dict(start, strict=False)
    names = {name for name, _ in model.named_parameters()}
    assert names == set(start), names ^ set(start)
    return model


def five_steps(model, tp_group=None) -> dict:
    """Losses of five steps, and the weights after them."""
    from megatron_ttt.layers.parameters import tensor_parallel_group

    group = tensor_parallel_group(tp_group)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (STEPS, 2, TOKENS + 1), generator=random)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    losses = []
    for ids in tokens:
        if tp_group is None:
            loss = model(ids[:, :-1], None, None, labels=ids[:, 1:]).mean()
        else:  # megatron-core 0.16's loss knows the global group only
            logits = model(ids[:, :-1], None, None)
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            # Under sequence parallelism each rank saw its tokens only.
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "end": {n: p.detach().clone() for n, p in model.named_parameters()}}


SIDES = {"trainer": trainer_side, "plain": plain_side}

if __name__ == "__main__":
    main()
