import numpy as np
import pytest
import torch
from data_helpers import numbered_documents, write_pair
from test_dataset import build_train

from megatron_ttt.data.dataset import FixedBatches
from megatron_ttt.data.sampling import TokenLoader, microbatch_indices
from megatron_ttt.errors import UserError


@pytest.fixture
def batches(tmp_path) -> FixedBatches:
    np.save(tmp_path / "ids.npy", np.arange(5 * 12 * 4).reshape(5, 12, 4))
    return FixedBatches(tmp_path / "ids.npy")


def test_ranks_share_out_each_slice_of_the_global_batch():
    sizes = {"global_batch_size": 12, "micro_batch_size": 2, "dp_size": 3}
    ranks = [microbatch_indices(4, dp_rank=rank, **sizes) for rank in range(3)]
    assert ranks[0] == [[48, 49], [54, 55]]
    assert ranks[1] == [[50, 51], [56, 57]]
    assert ranks[2] == [[52, 53], [58, 59]]


def test_batch_sizes_that_do_not_divide_are_refused(batches):
    with pytest.raises(UserError, match=r"global_batch_size 12 is not a multiple of .* 5 x 2"):
        TokenLoader(batches, 0, 1, global_batch_size=12, micro_batch_size=5, dp_size=2)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_all_ranks_together_see_each_batch_whatever_their_number(batches, dp_size):
    loaders = [
        TokenLoader(
            batches, 0, 5, global_batch_size=12, micro_batch_size=2, dp_rank=rank, dp_size=dp_size
        )
        for rank in range(dp_size)
    ]
    for step, of_ranks in enumerate(zip(*loaders, strict=True)):
        slices = [torch.cat(of_microbatch) for of_microbatch in zip(*of_ranks, strict=True)]
        assert torch.equal(torch.cat(slices), torch.arange(48).view(12, 4) + 48 * step)
    assert step == 4


def test_a_resumed_run_goes_on_with_the_same_batches(batches):
    sizes = {"global_batch_size": 6, "micro_batch_size": 3}
    whole = list(TokenLoader(batches, 0, 10, **sizes))
    resumed = list(TokenLoader(batches, 7, 10, **sizes))
    assert (len(whole), len(resumed)) == (10, 3)
    for expected, step in zip(whole[7:], resumed, strict=True):
        for a, b in zip(expected, step, strict=True):
            assert a.dtype == torch.int64
            assert a.shape == (3, 4)
            assert torch.equal(a, b)


def test_data_that_ends_before_the_last_step_is_refused(batches):
    sizes = {"global_batch_size": 12, "micro_batch_size": 12}
    assert len(TokenLoader(batches, 2, 5, **sizes)) == 3
    with pytest.raises(UserError, match="holds 60 samples, 6 steps take 72"):
        TokenLoader(batches, 2, 6, **sizes)


def test_loading_does_not_advance_the_random_state_of_the_run(batches):
    before = torch.get_rng_state()
    assert list(TokenLoader(batches, 0, 1, global_batch_size=12, micro_batch_size=12))
    assert torch.equal(torch.get_rng_state(), before)


def test_worker_processes_fetch_the_same_windows(tmp_path):
    prefix = write_pair(tmp_path / "data", numbered_documents(60, seed=1))
    dataset = build_train(tmp_path / "cache", prefix, 40)
    sizes = {"global_batch_size": 8, "micro_batch_size": 2}
    here = list(TokenLoader(dataset, 0, 5, **sizes))
    fetched = list(TokenLoader(dataset, 0, 5, num_workers=1, **sizes))
    for a, b in zip(here, fetched, strict=True):
        assert torch.equal(torch.stack(a), torch.stack(b))
