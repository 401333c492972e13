"""Everything that megatron-core needs to run on CPU + gloo.

What it needs on every device is in `mcore_workarounds/`; no other file patches anything.

megatron-core speaks to `torch.cuda` by name. Three pieces give those names a CPU meaning, and one
keeps away from a fault of gloo:

1. `torch.cuda` functions that megatron-core calls (`CUDA_FUNCTIONS`), and Stream and Event;
2. a TorchFunctionMode that turns device="cuda", `.cuda()`, `.to("cuda")` and `Tensor.type()` into
   their CPU twins;
3. megatron-core's random-state tracker, and the two functions recomputation saves states with;
4. data parallelism's collectives go one by one (`one_by_one`).

torch.compile is off here: megatron-core's `@jit_fuser` would compile for seconds per process.
"""

from __future__ import annotations

import contextlib
import os

import torch
import torch.distributed.distributed_c10d as c10d
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class InertStream:
    """Stands in for torch.cuda.Stream and torch.cuda.Event: on the CPU all work is in order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def wait(self, stream=None):
        pass

    def record(self, stream=None):
        pass

    def record_event(self, event=None):
        return self

    def synchronize(self):
        pass

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


CUDA_FUNCTIONS = {
    "current_device": lambda: CPU,
    "device_count": lambda: 1,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "manual_seed": torch.manual_seed,
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
    "current_stream": lambda device=None: InertStream(),
    "default_stream": lambda device=None: InertStream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "Stream": InertStream,
    "Event": InertStream,
}

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _names_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class CudaMeansCpu(TorchFunctionMode):
    """Every torch call that names a CUDA device gets the CPU instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs and _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DDP's gradient hooks and clip_grads compare against the CUDA names.
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **(kwargs or {}))


def _random_patches() -> dict[str, object]:
    """Replacements inside megatron.core.tensor_parallel.random, by name."""
    from megatron.core.tensor_parallel import random

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        """The tracker's contract, on the CPU generator's state."""

        def add(self, name, seed):
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name} or its seed {seed} already exists")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name=random._MODEL_PARALLEL_RNG_TRACKER_NAME):
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    return {
        "_CUDA_RNG_STATE_TRACKER": CpuRNGStatesTracker(),
        "_CUDA_RNG_STATE_TRACKER_INITIALIZED": True,
        "_get_cuda_rng_state": lambda device="cuda", clone=False, graph_safe=False: (
            torch.get_rng_state()
        ),
        "_set_cuda_rng_state": lambda state, device=-1, graph_safe=False: torch.set_rng_state(
            state
        ),
    }


@contextlib.contextmanager
def one_by_one(group, async_ops=False):
    """torch's `_coalescing_manager`, but the collectives within are not made one.

    Gloo's coalesced all-gather, when asynchronous, corrupts the heap: processes that do nothing
    else crash within seconds to a minute, with torch 2.13 as with 2.15.
    """
    together = c10d._CoalescingManager()
    operations = c10d._world.pg_coalesce_state.setdefault(group, [])
    try:
        yield together
    finally:
        del c10d._world.pg_coalesce_state[group]
    for operation in operations:
        tensors = [x for x in (operation.dst_tensor, operation.tensor) if x is not None]
        reduction = {} if operation.redop is None else {"op": operation.redop}
        together.append(operation.op(*tensors, group=group, async_op=async_ops, **reduction))


_mode: CudaMeansCpu | None = None


def install() -> None:
    """Install the pieces, once per process.

    Raises AttributeError, naming the symbol, where an upgrade of torch or megatron-core took away
    something that is replaced here.
    """
    global _mode
    if _mode is not None:
        return
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch._dynamo.config

    torch._dynamo.config.disable = True
    for name, replacement in CUDA_FUNCTIONS.items():
        getattr(torch.cuda, name)
        setattr(torch.cuda, name, replacement)
    torch.cuda.random.get_rng_state = CUDA_FUNCTIONS["get_rng_state"]
    _mode = CudaMeansCpu()
    _mode.__enter__()

    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import random

    for module, replacements in (
        (random, _random_patches()),
        (param_and_grad_buffer, {"_coalescing_manager": one_by_one}),
    ):
        for name, replacement in replacements.items():
            getattr(module, name)
            setattr(module, name, replacement)
