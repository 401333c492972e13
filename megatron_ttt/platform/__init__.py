"""The one choice between CUDA + NCCL and CPU + gloo.

`start()` is called once, before anything of megatron-core runs. On the CPU it installs the patches
of `cpu.py`; on CUDA it patches nothing. What is changed in megatron-core on every device is in
`mcore_workarounds/`, and is changed where it is needed.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_ttt.errors import UserError


@dataclass(frozen=True)
class Platform:
    """What differs between the two kinds of machine.

    kind: "cuda" or "cpu"; backend: torch.distributed's; core_overrides: TransformerConfig fields
    that this platform needs, over what the configuration says.
    """

    kind: str
    backend: str
    core_overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where this process keeps its tensors."""
        if self.kind == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next to it means something."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """The most memory this process has held: on the GPU, or resident on the CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CUDA = Platform("cuda", "nccl")
CPU = Platform(
    "cpu",
    "gloo",
    core_overrides={
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    },
)


def start(kind: str = "auto", *, deterministic: bool = False) -> Platform:
    """Choose and prepare the platform: "cuda", "cpu", or "auto" (CUDA where there is a GPU).

    deterministic: make CUDA's results repeat bit for bit; the CPU's always do.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        # As Megatron-LM has it: with one queue the collectives of tensor parallelism begin before
        # the weight gradients that are to hide them.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if not torch.cuda.is_available():
            raise UserError("run.device=cuda, but torch sees no GPU: set run.device=cpu or auto")
        if (index := CUDA.device.index) >= torch.cuda.device_count():
            raise UserError(
                f"process {index} of this node has no GPU, there are {torch.cuda.device_count()}: "
                "launch as many processes (--nproc-per-node), or see CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(CUDA.device)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            os.environ.setdefault("NCCL_ALGO", "Ring")
            torch.use_deterministic_algorithms(True)
            # It would fill with NaN whatever a kernel is about to write.
            torch.utils.deterministic.fill_uninitialized_memory = False
        return CUDA
    from megatron_ttt.platform import cpu

    cpu.install()
    return CPU


def start_process_group(platform: Platform, timeout_minutes: float = 10.0) -> None:
    """Join the job torchrun described in the environment; a lone process is a job of one."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    dist.init_process_group(platform.backend, timeout=datetime.timedelta(minutes=timeout_minutes))


def seed_everything(seed: int) -> None:
    """Seed torch and megatron-core's per-rank random states (needs the parallel groups)."""
    from megatron.core import tensor_parallel

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
