import fcntl
import hashlib
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import numbered_documents, write_pair

from megatron_ttt.data.blend import parse_blend, times_read
from megatron_ttt.data.dataset import FixedBatches, build_datasets
from megatron_ttt.errors import UserError

LENGTH = 16


def build(cache_dir: Path, train=None, train_samples=0, validation=None, validation_samples=0):
    return build_datasets(
        train,
        validation,
        train_samples=train_samples,
        validation_samples=validation_samples,
        seq_length=LENGTH,
        seed=3,
        cache_dir=cache_dir,
    )


def build_train(cache_dir: Path, blend, samples: int):
    return build(cache_dir, blend, samples)[0]


def test_windows_cover_an_epoch_once_and_overlap_by_one_token(tmp_path):
    documents = numbered_documents(60, seed=1)
    prefix = write_pair(tmp_path / "data", documents)
    tokens = sum(map(len, documents))
    count = (tokens - 1) // LENGTH
    dataset = build_train(tmp_path / "cache", prefix, count)
    assert len(dataset) == count
    samples = np.stack([dataset[i] for i in range(count)])
    assert samples.shape == (count, LENGTH + 1)
    assert samples.dtype == np.int64
    inputs = samples[:, :-1].ravel()
    assert len(set(inputs)) == len(inputs)  # no token is trained on twice in an epoch
    assert {0, 7} <= set(inputs)
    # Each window ends with the token that the next one of the shuffled stream begins with.
    assert len(set(samples[:, -1]) - set(samples[:, 0])) == 1
    # Inside a window only the end of a document breaks the numbering.
    last_ids = {document[-1] for document in documents}
    breaks = samples[:, :-1][np.diff(samples) != 1]
    assert len(breaks) > 0
    assert set(breaks) <= last_ids
    assert not np.array_equal(samples[:, 0], np.sort(samples[:, 0]))
    assert times_read(prefix, count, LENGTH) == {prefix: pytest.approx(count * LENGTH / tokens)}


def test_samples_beyond_those_asked_for_do_not_exist(tmp_path):
    prefix = write_pair(tmp_path / "data", numbered_documents(60, seed=1))
    dataset = build_train(tmp_path / "cache", prefix, 5)
    assert len(dataset) == 5
    for index in [5, -1]:
        with pytest.raises(IndexError):
            dataset[index]


def test_more_samples_than_text_repeat_it(tmp_path):
    prefix = write_pair(tmp_path / "data", numbered_documents(10, seed=1))
    dataset = build_train(tmp_path / "cache", prefix, 200)
    assert len([dataset[i] for i in range(200)]) == 200
    assert times_read(prefix, 200, LENGTH)[prefix] > 2


def test_train_and_validation_come_from_their_own_prefixes(tmp_path):
    train = write_pair(tmp_path / "train", numbered_documents(20, seed=1))
    validation = write_pair(tmp_path / "valid", numbered_documents(20, seed=2, first_id=50_000))
    train_set, validation_set = build(tmp_path / "cache", train, 30, [validation], 9)
    assert (len(train_set), len(validation_set)) == (30, 9)
    assert max(train_set[i].max() for i in range(30)) < 50_000
    assert min(validation_set[i].min() for i in range(9)) >= 50_000
    assert build(tmp_path / "cache", None, 0, validation, 9)[0] is None
    # The training data must not depend on what is validated on.
    alone = build_train(tmp_path / "cache2", train, 30)
    assert all(np.array_equal(alone[i], train_set[i]) for i in range(30))


def test_blends_mix_by_weight_or_by_tokens(tmp_path):
    small = write_pair(tmp_path / "small", numbered_documents(20, seed=1))
    large = write_pair(tmp_path / "large", numbered_documents(60, seed=2, first_id=50_000))

    def share_of_small(blend):
        dataset = build_train(tmp_path / "cache", blend, 400)
        return np.mean([dataset[i][0] < 50_000 for i in range(400)])

    assert share_of_small([0.9, small, 0.1, large]) == pytest.approx(0.9, abs=0.01)
    assert share_of_small([3, small, 1, large]) == pytest.approx(0.75, abs=0.01)
    assert share_of_small([small, large]) == pytest.approx(0.25, abs=0.05)


def test_few_samples_of_a_lopsided_blend(tmp_path):
    names = [write_pair(tmp_path / f"{n}", [np.arange(2 * LENGTH + 1)]) for n in range(11)]
    blend = [90, names[0]] + [entry for name in names[1:] for entry in (1, name)]
    for samples in [1, 2, 10]:
        dataset = build_train(tmp_path / "cache", blend, samples)
        assert len([dataset[i] for i in range(len(dataset))]) == samples


def test_other_data_under_the_same_path_gets_other_indices(tmp_path):
    prefix = write_pair(tmp_path / "data", numbered_documents(60, seed=1))
    build_train(tmp_path / "cache", prefix, 50)
    write_pair(tmp_path / "data", numbered_documents(90, seed=2, first_id=50_000))
    reused = build_train(tmp_path / "cache", prefix, 50)
    fresh = build_train(tmp_path / "fresh", prefix, 50)
    assert all(np.array_equal(reused[i], fresh[i]) for i in range(50))


def test_indices_of_a_killed_run_are_built_again(tmp_path):
    prefix = write_pair(tmp_path / "data", numbered_documents(60, seed=1))
    whole = build_train(tmp_path / "cache", prefix, 50)
    expected = [whole[i] for i in range(50)]
    del whole
    files = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:-5])
    files[1].write_bytes(b"")
    again = build_train(tmp_path / "cache", prefix, 50)
    assert all(np.array_equal(again[i], expected[i]) for i in range(50))


def blended_digest(directory: Path) -> str:
    blend = [0.3, str(directory / "a"), 0.7, str(directory / "b")]
    train, validation = build(directory / "cache", blend, 60, str(directory / "b"), 8)
    samples = [train[i] for i in range(60)] + [validation[i] for i in range(8)]
    return hashlib.sha256(np.stack(samples).tobytes()).hexdigest()


def build_on_rank(rank: int, directory: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2
    )
    (directory / f"digest{rank}").write_text(blended_digest(directory))
    torch.distributed.destroy_process_group()


def test_two_ranks_see_what_one_process_sees(tmp_path):
    write_pair(tmp_path / "a", numbered_documents(30, seed=1))
    write_pair(tmp_path / "b", numbered_documents(30, seed=2, first_id=50_000))
    was_initialized = torch.distributed.is_initialized()
    torch.multiprocessing.spawn(build_on_rank, (tmp_path,), nprocs=2)
    digests = [(tmp_path / f"digest{rank}").read_text() for rank in range(2)]
    assert digests[0] == digests[1] == blended_digest(tmp_path)
    assert torch.distributed.is_initialized() == was_initialized


@pytest.mark.parametrize(
    "blend", [[], [0.5], ["a", 0.5], [0.5, "a", "b"], [0.0, "a"], [-1, "a", 2, "b"], [1, 2]]
)
def test_bad_blends_are_refused(blend):
    with pytest.raises(UserError, match="data blend"):
        parse_blend(blend)


def test_blends_are_prefixes_or_weights_and_prefixes():
    assert parse_blend("a") == (["a"], None)
    assert parse_blend(["a", "b"]) == (["a", "b"], None)
    assert parse_blend([0.3, "a", 1, "b"]) == (["a", "b"], [0.3, 1.0])


def test_missing_and_too_small_data_are_refused_before_anything_is_built(tmp_path):
    good = write_pair(tmp_path / "good", numbered_documents(30, seed=1))
    with pytest.raises(UserError, match=r"none\.idx not found"):
        build(tmp_path / "cache", good, 5, str(tmp_path / "none"), 5)
    small = write_pair(tmp_path / "small", [np.arange(LENGTH)])
    with pytest.raises(
        UserError, match=r"small holds 16 tokens, too few for one sample of 16 \+ 1"
    ):
        build(tmp_path / "cache", good, 5, small, 5)
    assert not (tmp_path / "cache").exists()
    enough = write_pair(tmp_path / "enough", [np.arange(LENGTH + 1)])
    np.testing.assert_array_equal(
        build_train(tmp_path / "cache", enough, 1)[0], np.arange(LENGTH + 1)
    )


def test_processes_that_load_map_the_indices_again(tmp_path):
    prefix = write_pair(tmp_path / "data", numbered_documents(3000, seed=1))
    built = build_train(tmp_path / "cache", prefix, 4000)
    mapped = build_train(tmp_path / "cache", prefix, 4000)
    for dataset in (built, mapped):
        content = pickle.dumps(dataset)
        assert len(content) < 1000
        copy = pickle.loads(content)
        assert len(copy) == 4000
        assert all(np.array_equal(copy[i], built[i]) for i in range(0, 4000, 97))
    np.save(tmp_path / "fixed.npy", np.arange(9000, dtype=np.int32).reshape(9, 10, 100))
    fixed = FixedBatches(tmp_path / "fixed.npy")
    content = pickle.dumps(fixed)
    assert len(content) < 1000
    assert all(np.array_equal(pickle.loads(content)[i], fixed[i]) for i in range(90))


def test_a_cache_that_another_run_writes_to_is_waited_for(tmp_path, capsys):
    prefix = write_pair(tmp_path / "data", numbered_documents(60, seed=1))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "half.npy").write_bytes(b"what it is writing")
    seen = []

    def release(lock):
        seen.extend(path.name for path in (tmp_path / "cache").iterdir())
        lock.close()

    lock = open(tmp_path / "cache" / "lock", "a")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.5, release, [lock]).start()
    assert len(build_train(tmp_path / "cache", prefix, 20)) == 20
    assert sorted(seen) == ["half.npy", "lock"]
    assert "Waiting for another run that is at work in" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    prefix = write_pair(tmp_path / "data", numbered_documents(60, seed=1))
    with pytest.raises(UserError, match="cannot write the index cache /sys/kernel: "):
        build_train(Path("/sys/kernel"), prefix, 20)


def test_a_cache_that_cannot_be_made_is_refused(tmp_path):
    prefix = write_pair(tmp_path / "data", numbered_documents(10, seed=1))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the index cache"):
        build_train(tmp_path / "file" / "cache", prefix, 5)


def test_fixed_batches_count_through_steps_and_rows(tmp_path):
    ids = np.arange(3 * 4 * 6, dtype=np.int32).reshape(3, 4, 6)
    np.save(tmp_path / "ids.npy", ids)
    batches = FixedBatches(tmp_path / "ids.npy")
    assert (len(batches), batches.steps, batches.batch_size, batches.seq_length) == (12, 3, 4, 5)
    np.testing.assert_array_equal(batches[6], ids[1, 2])
    assert batches[6].dtype == np.int64


def test_files_that_are_no_fixed_batches_are_refused(tmp_path):
    path = tmp_path / "ids.npy"
    with pytest.raises(UserError, match=r"cannot read .*ids\.npy: No such file"):
        FixedBatches(path)
    for array in [np.zeros((2, 3), np.int64), np.zeros((2, 3, 4), np.float32)]:
        np.save(path, array)
        with pytest.raises(UserError, match=r"needed are integer token ids"):
            FixedBatches(path)
    np.save(path, np.zeros((2, 3, 4), np.int64))
    for content in [path.read_bytes()[:-1], b"text", b""]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"ids\.npy is not a whole \.npy file"):
            FixedBatches(path)
