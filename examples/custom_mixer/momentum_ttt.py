"""TTT-Linear whose inner gradient has momentum and whose state decays, in the spirit of Titans
(arXiv 2501.00663). Both rates are learned, one of each a head.

A mini-batch is answered as in TTT-Linear. Then, with g the sum of its gradient steps,

    S <- momentum S + g,    W <- (1 - decay) W - S,

and the same for b. A run needs `model.mixer_modules: [examples.custom_mixer.momentum_ttt]`, which
imports this file; docs/mixers.md builds it step by step.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_ttt.mixers import register_mixer
from megatron_ttt.mixers.base import Dimensions, Microbatch, Parameter
from megatron_ttt.mixers.hf_code import HFCode
from megatron_ttt.mixers.ttt import HF_FILES
from megatron_ttt.mixers.ttt.inner_model import InnerModel
from megatron_ttt.mixers.ttt.layer import TTTMixer, ttt_mixer_spec
from megatron_ttt.mixers.ttt.linear.reference import mini_batch, predict
from megatron_ttt.mixers.ttt.mixer import TTT
from megatron_ttt.mixers.ttt.options import TTTOptions

RATES = {"momentum_logit": -1.0, "decay_logit": -4.0}
"""The rates are sigmoids of these, which start here: 0.27 and 0.018."""


def state_shapes(head_dim: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of a head's state: W, b and their momentum, which starts learned too."""
    matrix, row = (head_dim, head_dim), (1, head_dim)
    return {"W1": matrix, "b1": row, "momentum_W1": matrix, "momentum_b1": row}


def momentum_mini_batch(momentum, decay, q, x, v, lam, tau, gamma, beta, state):
    """Return the outputs of a mini-batch and the next state; momentum, decay: [H, 1, 1]."""
    W, b, S_W, S_b = state
    output, (W_stepped, b_stepped) = mini_batch(q, x, v, lam, tau, gamma, beta, (W, b))
    S_W = momentum * S_W + (W - W_stepped)
    S_b = momentum * S_b + (b - b_stepped)
    return output, ((1 - decay) * W - S_W, (1 - decay) * b - S_b, S_W, S_b)


def predict_with_momentum(x, state):
    """Return the inner model's output before its LayerNorm."""
    return predict(x, state[:2])


MOMENTUM = InnerModel(
    "momentum", state_shapes, momentum_mini_batch, predict_with_momentum, flops=(6, 4)
)


def constant(value: float):
    """Return an initialiser that fills with a value."""
    return lambda tensor, generator: tensor.fill_(value)


class MomentumLayer(TTTMixer):
    """TTT-Linear's layer with the inner model above."""

    def inner_model(self) -> InnerModel:
        """Return the inner model with this layer's rates, one of each a head."""
        rates = (torch.sigmoid(getattr(self, name))[:, None, None] for name in RATES)
        return replace(MOMENTUM, mini_batch=partial(momentum_mini_batch, *rates))


class MomentumTTT(TTT):
    """What the mixer says of itself, where it is not what TTT-Linear says."""

    def parameters(self, dims: Dimensions, options: TTTOptions) -> list[Parameter]:
        """Return TTT-Linear's table with the state's momentum and the two rates of each head."""
        rates = [
            Parameter(
                name,
                (dims.num_heads,),
                constant(start),
                (f"{self.hf_module}.{name}",),
                shard_dim=0,
                fp32=True,
            )
            for name, start in RATES.items()
        ]
        return [*super().parameters(dims, options), *rates]

    def unsupported_reason(self, dims, options, *, backend, **_) -> str | None:
        """Return why a backend cannot run: there is the reference alone."""
        return None if backend in ("auto", "naive") else "momentum_ttt has the reference form alone"

    def saved_state_bytes(self, options: TTTOptions, batch: Microbatch) -> float:
        """Return the bytes that autograd saves: some eight matrices a mini-batch and head."""
        mini_batches = -(-batch.seq_length // options.mini_batch_size)
        heads = batch.sequences * batch.dims.num_heads / batch.tp
        return heads * mini_batches * 8 * 4 * batch.dims.head_dim**2

    def spec(self, options: TTTOptions, backend: str = "auto"):
        """Return the spec of the module."""
        return ttt_mixer_spec(self, options, "naive", module=MomentumLayer)

    def hf_model(self, dims: Dimensions, options: TTTOptions) -> None:
        """Return None: there is no official form."""

    def options_of_hf_model(self, config) -> None:
        """Return None, as above."""


HF_CODE = HFCode(Path(__file__).parent / "mixer_momentum_ttt.py", "MomentumTTT", needs=HF_FILES)
MOMENTUM_TTT = register_mixer(
    MomentumTTT("momentum_ttt", "TTT-Linear with momentum", MOMENTUM, HF_CODE)
)
