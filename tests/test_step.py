"""The host reads from the device once a step, when all of it is launched."""

import pytest
import torch
from small_run import STEPS, small_recipe
from torch.utils._python_dispatch import TorchDispatchMode

SWITCHES = ("use_gate", "share_qk", "pre_conv")

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor for which the host waits."""
READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "bincount")
"""Operations for which it waits, wherever they are called from."""


class Reads(TorchDispatchMode):
    """The names of the reads that happen in its context."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.within = [], 0
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self.noted(name))

    def noted(self, name):
        method = getattr(torch.Tensor, name)

        def read(tensor, *arguments, **options):
            # A function mode, as the CPU's platform is, calls what it was called for once more.
            if self.within == 0:
                self.names.append(name)
            self.within += 1
            try:
                return method(tensor, *arguments, **options)
            finally:
                self.within -= 1

        return read

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        # A mask is made a list of places, of which the host must know the number; but for writing
        # one number to them, which is a fill.
        masked = name == "index" and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if (name in READING or masked) and self.within == 0:
            self.names.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        ["model.pattern=ttt_linear"],
        ["model.pattern=ttt_mlp", *(f"mixers.ttt_mlp.{name}=false" for name in SWITCHES)],
        ["model.pattern=attention"],
    ],
    ids=["linear", "mlp", "attention"],
)
def test_a_step_reads_once(build_trainer, tmp_path, monkeypatch, options, precision):
    trainer = build_trainer(
        *small_recipe(tmp_path),
        f"run.dir={tmp_path}/run",
        *options,
        f"training.precision={precision}",
    )
    first, second, *_ = trainer.data.train_batches(0, STEPS)
    trainer.train_step(first)
    with monkeypatch.context() as patch, Reads(patch) as reads:
        # Rounds a number of the host's by way of a tensor.
        patch.setattr("megatron_ttt.training.trainer.inner_lr_scale", lambda config, step: 0.5)
        trainer.train_step(second)
    assert reads.names == ["tolist"]
