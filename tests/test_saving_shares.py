"""A rank writes and reads its share of a checkpoint, holds no more, and gathers nothing."""

import json

import numpy as np
import pytest
from harness import ROOT, one_here, torchrun

MODEL = {"num_layers": 8, "hidden_size": 384, "num_heads": 6, "ffn_hidden_size": 1024}
VOCABULARY = 16000
BYTES_A_PARAMETER = 2 + 12  # weights in bf16; main weights and two moments


@pytest.mark.parametrize("ranks", one_here([2, 4]))
def test_of_equal_shares(ranks, tmp_path):
    np.save(tmp_path / "tokens.npy", np.zeros((1, 4, 33), dtype=np.int64))
    torchrun(
        ranks,
        ROOT / "tests/saving_shares.py",
        tmp_path / "found.json",
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        f"model.vocab_size={VOCABULARY}",
        *("data.train=[]", "data.validation=[]", "data.tokenizer_model=null"),
        f"data.fixed_batches={tmp_path}/tokens.npy",
        *("training.seq_length=32", "training.micro_batch_size=1", "training.global_batch_size=4"),
        *("training.precision=bf16", "training.steps=1", "run.device=cpu"),
        *("checkpoint.asynchronous=false", "checkpoint.keep=0", f"run.dir={tmp_path}/run"),
    )
    found = json.loads((tmp_path / "found.json").read_text())
    print(json.dumps(found))
    parameters = found[0]["parameters"]
    assert parameters > 20e6
    share = parameters * BYTES_A_PARAMETER / ranks
    wrote = np.array([one["wrote"] for one in found])
    assert np.abs(wrote / wrote.mean() - 1).max() < 0.1 and abs(wrote.mean() / share - 1) < 0.1
    boxes = sum(one["boxes"] for one in found)
    for one in found:
        for of in ("save", "load"):
            assert one[of]["held"] < 1.2 * share, of
            # Plans, for a part of which rank 0 has everyone's.
            assert one[of]["sent"] < 2048 * boxes, of
