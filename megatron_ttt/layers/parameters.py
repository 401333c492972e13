"""Parameters of our own layers: how they are cut over TP ranks, and how each one starts.

A parameter's global tensor is what one process without parallelism would hold. `local_shard` cuts
this rank's part out of it; initial weights and imported ones both come in through it, so that the
same seed gives the same model at every layout.

Layers start their own parameters, as megatron-core's do, so that they can stand in any model; the
trainer then fills them by name with `initialise`. Everything takes the group of tensor-parallel
ranks as `tp_group`; None is megatron-core's global one.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_ttt.layers.initialisers import Initialiser


class ParameterHolder(nn.Module):
    """Parameters of an operation that is no module; the call hands them out.

    They are to be had by calls alone: while megatron-core's DDP gathers weights in the background,
    it waits for a module's own when that module is called.
    """

    def __init__(self, **parameters: nn.Parameter):
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def forward(self) -> tuple[nn.Parameter, ...]:
        """The parameters, in the order they were given."""
        return tuple(self.parameters())


class KeepsFloat32(nn.Module):
    """A module whose own parameters stay in float32 in a half-precision model; its children's do
    not."""

    def _apply(self, fn, recurse=True):
        """Cast and move as any module, but leave own parameters in at least float32.

        megatron-core's Float16Module casts all of a model, and knows no exceptions.
        """

        def at_least_float32(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(applied.device, torch.float32)
            return applied

        if recurse:
            for module in self.children():
                module._apply(fn)
        return super()._apply(at_least_float32, recurse=False)


def tensor_parallel_group(tp_group: ProcessGroup | None = None) -> ProcessGroup:
    """Return the group itself, or megatron-core's global one for None."""
    return parallel_state.get_tensor_model_parallel_group() if tp_group is None else tp_group


def new_parameter(
    config,
    shape: tuple[int, ...],
    initialiser: Initialiser,
    *,
    shard_dim: int | None = None,
    fp32: bool = False,
    tp_group: ProcessGroup | None = None,
) -> nn.Parameter:
    """Return a parameter of a layer, given its global shape.

    It is filled unless `config.perform_initialization` is off. shard_dim: dimension cut over TP
    ranks; None for a replicated parameter. fp32: keep it in float32 when the model is in half
    precision (and its optimizer state apart, see training/optimizer.py).
    """
    local_shape = shape
    if shard_dim is not None:
        rows = shape[shard_dim] // tensor_parallel_group(tp_group).size()
        local_shape = (*shape[:shard_dim], rows, *shape[shard_dim + 1 :])
    dtype = config.params_dtype
    if fp32:
        dtype = torch.promote_types(dtype, torch.float32)
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = nn.Parameter(torch.empty(local_shape, dtype=dtype, device=device))
    tensor_parallel.set_tensor_model_parallel_attributes(
        parameter, shard_dim is not None, 0 if shard_dim is None else shard_dim, 1
    )
    if fp32:
        parameter.keep_fp32 = True
    if config.perform_initialization:
        _start(parameter, shape, initialiser, config.use_cpu_initialization, tp_group)
    return parameter


@torch.no_grad()
def _start(
    parameter: nn.Parameter,
    shape: tuple[int, ...],
    initialiser: Initialiser,
    on_cpu: bool,
    tp_group: ProcessGroup | None,
) -> None:
    """Fill a parameter the way megatron-core fills its linear layers.

    On the CPU every rank draws the global tensor, from the same state, and cuts its part out. On
    CUDA each draws its own part from megatron-core's random state of its TP rank, or a replicated
    parameter from the state that TP ranks share.
    """
    if on_cpu or not parameter.tensor_model_parallel:
        whole = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        initialiser(whole, None)
        parameter.copy_(local_shard(parameter, whole, tp_group))
        return
    part = torch.empty_like(parameter, dtype=torch.float32)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        initialiser(part, None)
    parameter.copy_(part)


def global_shape(parameter: nn.Parameter, tp_group: ProcessGroup | None = None) -> tuple[int, ...]:
    """The shape of a parameter's global tensor."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tensor_parallel_group(tp_group).size()
    return tuple(shape)


def local_shard(
    parameter: nn.Parameter, global_tensor: Tensor, tp_group: ProcessGroup | None = None
) -> Tensor:
    """This TP rank's part of a global tensor, which is cut the way `parameter` is.

    A packed projection is cut part by part: its partition_stride counts the parts.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return global_tensor
    group = tensor_parallel_group(tp_group)
    rank, size = group.rank(), group.size()
    dim, parts = parameter.partition_dim, parameter.partition_stride
    return torch.cat([part.chunk(size, dim)[rank] for part in global_tensor.chunk(parts, dim)], dim)


def gather_global(
    parameter: nn.Parameter, local: Tensor, tp_group: ProcessGroup | None = None
) -> Tensor:
    """The inverse of `local_shard`, collective over the TP group: every rank's `local` (the
    parameter, its gradient) put together to the global tensor."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return local
    group = tensor_parallel_group(tp_group)
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local.contiguous(), group=group)
    dim, parts = parameter.partition_dim, parameter.partition_stride
    pieces = zip(*(shard.chunk(parts, dim) for shard in shards))
    return torch.cat([piece for part in pieces for piece in part], dim)


@torch.no_grad()
def initialise(
    parameter: nn.Parameter,
    name: str,
    shape: tuple[int, ...],
    initialiser: Initialiser,
    seed: int,
    tp_group: ProcessGroup | None = None,
) -> None:
    """Fill a parameter from a stream of random numbers of its own.

    name: the parameter's global name; it and the seed alone decide the numbers, so they do not
    depend on the layout or the device. shape: of the part of the global tensor that is filled; rows
    beyond it (vocabulary padding) become zero.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    filled = torch.empty(shape, dtype=torch.float32)
    initialiser(filled, generator)
    whole = torch.zeros(global_shape(parameter, tp_group), dtype=torch.float32)
    whole[tuple(slice(size) for size in shape)] = filled
    parameter.copy_(local_shard(parameter, whole, tp_group))
