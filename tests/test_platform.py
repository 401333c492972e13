"""What the CPU platform replaces must exist to be replaced, and do what CUDA's does."""

import pytest
import torch
import torch.distributed as dist

from megatron_ttt import platform as platforms
from megatron_ttt.errors import UserError
from megatron_ttt.platform import cpu


@pytest.mark.parametrize("name", cpu.CUDA_FUNCTIONS)
def test_cuda_function_is_replaced(cpu_platform, name):
    assert getattr(torch.cuda, name) is cpu.CUDA_FUNCTIONS[name]


@pytest.mark.parametrize(
    "name",
    [
        "_CUDA_RNG_STATE_TRACKER",
        "_CUDA_RNG_STATE_TRACKER_INITIALIZED",
        "_get_cuda_rng_state",
        "_set_cuda_rng_state",
    ],
)
def test_random_symbol_is_replaced(cpu_platform, name):
    from megatron.core.tensor_parallel import random

    replaced = getattr(random, name)
    origin = type(replaced) if name == "_CUDA_RNG_STATE_TRACKER" else replaced
    assert replaced is True or origin.__module__ == "megatron_ttt.platform.cpu"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_collectives_of_data_parallelism_go_one_by_one(cpu_platform, asynchronous):
    from megatron.core.distributed import param_and_grad_buffer

    manager = param_and_grad_buffer._coalescing_manager
    assert manager is cpu.one_by_one
    shards, gathered, group = torch.rand(2, 3), torch.zeros(2, 3), dist.group.WORLD
    with manager(group, async_ops=asynchronous) as together:
        for output, shard in zip(gathered, shards):
            dist.all_gather_into_tensor(output, shard, group=group, async_op=asynchronous)
        assert not gathered.any()
    together.wait()
    assert torch.equal(gathered, shards)
    assert len(together.works) == (2 if asynchronous else 0)
    # A sum would have gone through.
    with pytest.raises(RuntimeError, match="BAND"), manager(group):
        dist.all_reduce(shards, op=dist.ReduceOp.BAND, group=group)


def test_cuda_devices_mean_the_cpu(cpu_platform):
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=torch.device("cuda", 1)).device.type == "cpu"
    assert torch.zeros(2).to("cuda").device.type == "cpu"
    tensor = torch.zeros(2)
    assert tensor.cuda() is tensor
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.long().type() == "torch.LongTensor"
    assert tensor.type(torch.int64).dtype == torch.int64


def test_tracked_random_states_are_apart_and_come_back(cpu_platform):
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    outside = torch.get_rng_state()
    states = tracker.get_states()
    with tracker.fork():
        first = torch.rand(3)
    with tracker.fork():
        second = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    assert not torch.equal(first, second)
    tracker.set_states(states)
    with tracker.fork():
        assert torch.equal(torch.rand(3), first)


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="process 4 of this node has no GPU, there are 4"):
        platforms.start("cuda")
