import math

import numpy as np
import pytest
from data_helpers import write_pair

from megatron_ttt.data import unigram
from megatron_ttt.data.unigram import unigram_entropy
from megatron_ttt.errors import UserError


def test_cross_entropy_under_smoothed_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(unigram, "_CHUNK_TOKENS", 2)
    train = write_pair(tmp_path / "train", [np.array([0, 0, 0]), np.array([1])], "<u2")
    validation = write_pair(tmp_path / "valid", [np.array([0, 1, 2, 0])], "<u2")
    expected = -(2 * math.log(4 / 8) + math.log(2 / 8) + math.log(1 / 8)) / 4
    assert unigram_entropy(train, validation, 4) == pytest.approx(expected, rel=1e-12)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    pair = write_pair(tmp_path / "train", [np.array([0, 4])])
    assert unigram_entropy(pair, pair, 5) > 0
    with pytest.raises(UserError, match=r"train\.bin holds token ids outside 0\.\.3"):
        unigram_entropy(pair, pair, 4)
