"""TTT layers in scripts that are not this project's: the example, and megatron-core's own loop."""

import re
import shlex
import sys

import pytest
from harness import ROOT, environment, run, torchrun


def losses(output: str, pattern: str) -> list[float]:
    return [float(loss) for loss in re.findall(pattern, output)]


@pytest.mark.parametrize("layout", [["--tensor-parallel", "2"], ["--spec", "ttt_mlp_spec"]])
def test_the_example_trains(layout):
    script = ROOT / "examples/megatron_lm/train.py"
    found = losses(torchrun(2, script, "--steps", "3", *layout), r"step \d loss (\S+)")
    assert len(found) == 3 and 5.7 > found[0] > found[1] > found[2]


PRETRAIN = shlex.split("""
    --spec megatron_ttt.mixers ttt_linear_spec --normalization RMSNorm
    --position-embedding-type none --swiglu --disable-bias-linear
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 176
    --seq-length 40 --max-position-embeddings 40 --hidden-dropout 0 --attention-dropout 0
    --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant
    --mock-data --split 100,0,0 --tokenizer-type NullTokenizer --vocab-size 96
    --log-interval 1 --eval-iters 0 --eval-interval 100 --save-interval 5 --train-iters 5
    --bf16 --use-distributed-optimizer
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --distributed-backend gloo --use-cpu-initialization --transformer-impl local --num-workers 0
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
""")


def test_megatron_cores_own_loop_trains_and_saves(tmp_path):
    """With causal masks, which its data has by default; in bf16, with the distributed optimizer."""
    pytest.importorskip("megatron.training", reason="megatron-core before 0.19 has no loop")
    script = ROOT / "tests/megatron_pretrain.py"
    environ = {**environment(), "PYTHONOPTIMIZE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    command = [sys.executable, script, *PRETRAIN, "--save", tmp_path]
    output = run(command, ranks=1, forked=False, env=environ)
    found = losses(output, r"lm loss: (\S+) ")
    assert len(found) == 5 and 5.0 > found[0] > found[2] > found[4]
    assert "successfully saved checkpoint from iteration       5" in output
