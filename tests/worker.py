"""Run one case on every rank of a job.

    torchrun --nproc-per-node N tests/worker.py CASE.json

A case is one of
- {"import": HF_DIR, "output": CHECKPOINT};
- {"evaluate": CHECKPOINT, "dtype", "overrides", "input_ids": NPY, "output": FOLDER}: writes
  FOLDER/result.safetensors with `logits` and `grad/NAME`;
- {"statistics": CHECKPOINT, "dtype", "overrides", "input_ids": NPY, "output": FOLDER}: writes
  FOLDER/result.safetensors with every layer's inner statistics, by field;
- {"train": [YAML], "overrides", "output": FOLDER, "gradients": bool, "moments": bool}: writes
  FOLDER/result.safetensors with the final weights, `param/NAME`, and on request the first step's
  gradients, `grad/NAME`, and AdamW's moments before the first step and after the last,
  `first/exp_avg/NAME` and `last/exp_avg/NAME`, and so for `exp_avg_sq`; FOLDER/result.json: what
  did not hold on some rank. Losses are in the run's own metrics.jsonl.
Names are the official ones.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    """Run the case of the file named on the command line."""
    faulthandler.enable()
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    case = json.loads(path.read_text())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(f"{path}.store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    CASES[next(kind for kind in CASES if kind in case)](case)
    dist.barrier()


def import_case(case: dict) -> None:
    """Make a checkpoint of an official directory."""
    from megatron_ttt.hf.importer import import_directory

    import_directory(Path(case["import"]), Path(case["output"]))


def evaluate_case(case: dict) -> None:
    """Logits and gradients of a checkpoint."""
    from megatron_ttt import evaluation
    from megatron_ttt.process import prepare_process

    config = evaluation.evaluation_config(case["evaluate"], case["overrides"])
    platform = prepare_process(config)
    dtype = getattr(torch, case["dtype"])
    evaluator = evaluation.Evaluator(config, platform, case["evaluate"], dtype)
    ids = evaluation.read_input_ids(Path(case["input_ids"]), config.model.vocab_size)
    logits = evaluator.logits(ids)
    tensors = {f"grad/{name}": grad for name, grad in evaluator.gradients(ids).items()}
    if evaluation.is_last_stage_writer():
        write_tensors(case, {"logits": logits, **tensors})


def statistics_case(case: dict) -> None:
    """The inner loop's statistics of a checkpoint, which every rank must see alike."""
    from megatron_ttt import evaluation
    from megatron_ttt.process import prepare_process
    from megatron_ttt.training.inner_loop import observe_inner_loop

    config = evaluation.evaluation_config(case["statistics"], case["overrides"])
    platform = prepare_process(config)
    dtype = getattr(torch, case["dtype"])
    evaluator = evaluation.Evaluator(config, platform, case["statistics"], dtype)
    ids = evaluation.read_input_ids(Path(case["input_ids"]), config.model.vocab_size)
    # Each data-parallel rank looks at its share.
    from megatron.core import parallel_state

    ranks, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    seen = observe_inner_loop(evaluator.chunks, lambda: evaluator.logits(ids.chunk(ranks)[rank]))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    for other in everyone:
        assert all(torch.equal(a, b) for n, of in seen.items() for a, b in zip(of, other[n]))
    if dist.get_rank() == 0:
        fields = next(iter(seen.values()))._fields
        stacked = {f: torch.stack([getattr(of, f) for of in seen.values()]) for f in fields}
        write_tensors(case, stacked)


def train_case(case: dict) -> None:
    """One training run, from building to its last step."""
    from megatron_ttt.config import load_config
    from megatron_ttt.process import prepare_process
    from megatron_ttt.training.trainer import Trainer

    config = load_config(case["train"], case["overrides"])
    platform = prepare_process(config)
    trainer = Trainer(config, platform)
    tensors, problems = {}, []
    if case.get("gradients"):
        first_gradients(trainer, tensors, problems)
    if case.get("moments"):
        collect_moments(trainer, "first", tensors, problems)
    trainer.train()
    if case.get("moments"):
        collect_moments(trainer, "last", tensors, problems)
    from megatron_ttt.training.optimizer import gather_parameters

    gather_parameters(trainer.ddp_chunks)
    collect(trainer, "param", lambda parameter: parameter.data, tensors, problems)
    check_dtypes(trainer, problems)
    facts = {
        "problems": gathered(problems),
        "buckets": bucket_table(trainer),
    }
    if dist.get_rank() == 0:
        write_tensors(case, tensors)
        (Path(case["output"]) / "result.json").write_text(json.dumps(facts))


def write_tensors(case: dict, tensors: dict) -> None:
    """OUTPUT/result.safetensors."""
    from safetensors.torch import save_file

    output = Path(case["output"])
    output.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, output / "result.safetensors")


def bucket_table(trainer) -> list[list[list[int]]]:
    """For each gradient buffer, each bucket's [elements of parameters, elements with padding]."""
    return [
        [
            [sum(p.numel() for p in bucket.params), bucket.grad_data.numel()]
            for bucket in buffer.buckets
        ]
        for ddp in trainer.ddp_chunks
        for buffer in ddp.buffers
    ]


def first_gradients(trainer, tensors: dict, problems: list) -> None:
    """The gradients of the first batch; the trainer is left as it was."""
    from megatron_ttt.model import set_inner_lr_scale
    from megatron_ttt.training.schedules import inner_lr_scale
    from megatron_ttt.training.step import run_batches

    for chunk in trainer.ddp_chunks:
        chunk.zero_grad_buffer()
        chunk.train()
    set_inner_lr_scale(trainer.chunks, inner_lr_scale(trainer.config, trainer.step + 1))
    microbatches = next(trainer.data.train_batches(trainer.step, trainer.step + 1))
    run_batches(
        trainer.ddp_chunks, microbatches, trainer.data.ignored_target_id, trainer.platform.device
    )
    # Each data-parallel rank holds its shard of every reduced bucket.
    for ddp in trainer.ddp_chunks:
        for buffer in ddp.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather(list(bucket.grad_data.chunk(group.size())), shard, group=group)
    collect(trainer, "grad", lambda parameter: parameter.main_grad, tensors, problems)


def collect_moments(trainer, when: str, tensors: dict, problems: list) -> None:
    """The optimizer's moments, put together from the shards of all ranks."""
    for key in ("exp_avg", "exp_avg_sq"):
        collect(trainer, f"{when}/{key}", partial(whole_moment, trainer, key), tensors, problems)


def whole_moment(trainer, key: str, parameter: torch.Tensor) -> torch.Tensor:
    """A moment of this rank's parameter, of which data-parallel ranks hold a piece each."""
    from megatron.core import parallel_state

    whole = torch.zeros(parameter.numel())
    for optimizer in trainer.optimizer.chained_optimizers:
        if parameter in optimizer.model_param_group_index_map:
            group, order = optimizer.model_param_group_index_map[parameter]
            shard = optimizer.optimizer.param_groups[group]["params"][order]
            piece = optimizer._get_model_param_range_map(parameter)["param"]
            whole[piece.start : piece.end] = optimizer.optimizer.state[shard][key].flatten()
    dist.all_reduce(whole, group=parallel_state.get_data_parallel_group())
    return whole.view(parameter.shape)


def collect(trainer, kind: str, tensor_of, tensors: dict, problems: list) -> None:
    """Global tensors of all stages into `tensors`, and replicas that are not bit-equal into
    `problems`."""
    from megatron.core import parallel_state

    from megatron_ttt.hf.mapping import gather_hf
    from megatron_ttt.model import global_parameters
    from megatron_ttt.stack import architecture_of

    group = parallel_state.get_tensor_model_parallel_group()
    for chunk in trainer.chunks:
        for name, parameter in global_parameters(chunk):
            local = tensor_of(parameter).detach()
            if not parameter.tensor_model_parallel:
                copies = [torch.empty_like(local) for _ in range(group.size())]
                dist.all_gather(copies, local.contiguous(), group=group)
                if not all(torch.equal(copy, local) for copy in copies):
                    problems.append(f"{kind} {name} differs between TP ranks")
    official = gather_hf(trainer.chunks, architecture_of(trainer.config), tensor_of)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, official)
    for other in everyone:
        for name, tensor in other.items():
            if not torch.equal(official[name], tensor):
                problems.append(f"{kind} {name} differs between ranks")
    tensors.update({f"{kind}/{name}": tensor for name, tensor in official.items()})


FP32 = ("W1", "b1", "W2", "b2", "learnable_token_idx", "ttt_norm", "learnable_ttt_lr")


def check_dtypes(trainer, problems: list) -> None:
    """Parameters of the inner model are float32 whatever the precision; the rest follow it."""
    rest = torch.bfloat16 if trainer.config.training.precision == "bf16" else torch.float32
    for chunk in trainer.chunks:
        for name, parameter in chunk.named_parameters():
            leaf = name.split("self_attention.")[-1]
            wanted = torch.float32 if leaf.startswith(FP32) else rest
            if parameter.dtype != wanted:
                problems.append(f"{name} is {parameter.dtype}, not {wanted}")


def gathered(problems: list) -> list:
    """Every rank's problems."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problems)
    return sorted({problem for one in everyone for problem in one})


CASES = {
    "import": import_case,
    "evaluate": evaluate_case,
    "statistics": statistics_case,
    "train": train_case,
}

if __name__ == "__main__":
    main()
