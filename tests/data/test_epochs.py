"""Which windows are drawn, epoch after epoch, and that asking for more changes none of them."""

import numpy as np
import pytest
from data_helpers import numbered_documents, write_pair
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from test_dataset import LENGTH, build, build_train


@pytest.fixture
def pairs(tmp_path) -> dict[str, str]:
    """Datasets of which each token id occurs once in all: a small one and a large one."""
    return {
        "small": write_pair(tmp_path / "small", numbered_documents(20, seed=1)),
        "large": write_pair(tmp_path / "large", numbered_documents(60, seed=2, first_id=50_000)),
    }


def rows(dataset) -> np.ndarray:
    return np.stack([dataset[i] for i in range(len(dataset))])


def tokens_of(prefix: str) -> np.ndarray:
    return np.fromfile(f"{prefix}.bin", "<i4")


def blends(pairs) -> list[list]:
    a, b = pairs["small"], pairs["large"]
    return [[a], [b], [0.3, a, 0.7, b], [a, b]]


class StandIn:
    """What GPTDataset asks of a tokenizer."""

    vocab_size, eod, pad, unique_identifiers = 100_000, 2, -1, {}


def test_one_epoch_is_drawn_as_megatron_core_draws_it(cpu_platform, pairs, tmp_path):
    for number, blend in enumerate(blends(pairs)):
        weights = [len(tokens_of(p)) for p in blend] if isinstance(blend[0], str) else blend[0::2]
        prefixes = blend if isinstance(blend[0], str) else blend[1::2]
        config = GPTDatasetConfig(
            random_seed=3,
            sequence_length=LENGTH,
            blend_per_split=[(prefixes, weights), None, None],
            path_to_cache=str(tmp_path / f"megatron{number}"),
            mid_level_dataset_surplus=0.1,
            tokenizer=StandIn(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [40, None, None], lambda: True, config)
        theirs = builder.build()[0]
        for index, row in enumerate(rows(build_train(tmp_path / "cache", blend, 40))):
            np.testing.assert_array_equal(row[:-1], theirs[index]["tokens"])
            np.testing.assert_array_equal(row[1:], theirs[index]["labels"])


def test_a_longer_run_begins_with_the_samples_of_a_shorter_one(pairs, tmp_path):
    for blend in blends(pairs):
        longest = rows(build_train(tmp_path / "cache", blend, 700))
        for samples in (1, 45, 100, 101, 350):
            shorter = rows(build_train(tmp_path / "cache", blend, samples))
            np.testing.assert_array_equal(shorter, longest[:samples])


def test_each_epoch_takes_every_document_once(pairs, tmp_path):
    ids = tokens_of(pairs["small"])
    ends = [(epoch * len(ids) - 1) // LENGTH for epoch in range(1, 4)]
    drawn = rows(build_train(tmp_path / "cache", pairs["small"], ends[-1]))
    orders = []
    for first, last in zip([0, *ends], ends):
        epoch = drawn[first:last, :-1].ravel()
        seen = np.bincount(epoch, minlength=len(ids))
        # All but the tokens of the window that this epoch shares with the next, or the last one.
        assert np.count_nonzero(seen != 1) < 2 * LENGTH
        orders.append(epoch.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_a_dataset_that_is_named_twice_is_read_as_one(pairs, tmp_path):
    a, b = pairs["small"], pairs["large"]
    for twice, once in (([a, a], [a]), ([1, a, 2, b, 1, a], [2, a, 2, b])):
        there = rows(build_train(tmp_path / "cache", twice, 60))
        np.testing.assert_array_equal(there, rows(build_train(tmp_path / "cache", once, 60)))


@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.1, 0.9), None])
def test_validation_takes_each_window_once(pairs, tmp_path, weights):
    prefixes = list(pairs.values())
    held = [(len(tokens_of(prefix)) - 1) // LENGTH for prefix in prefixes]
    blend = prefixes if weights is None else [e for pair in zip(weights, prefixes) for e in pair]
    _, validation = build(tmp_path / "cache", None, 0, blend, 10_000)
    inputs = rows(validation)[:, :-1]
    assert len(np.unique(inputs)) == inputs.size
    of_small = np.count_nonzero(inputs[:, 0] < 50_000)
    if weights is None:
        assert (of_small, len(inputs)) == (held[0], sum(held))
    else:
        # It ends where the first of the two has no more to give; the mix is what was asked for.
        assert held[0] == of_small or held[1] == len(inputs) - of_small
        assert of_small / len(inputs) == pytest.approx(weights[0], abs=0.02)
    _, fewer = build(tmp_path / "cache", None, 0, blend, 30)
    np.testing.assert_array_equal(rows(fewer), rows(validation)[:30])
