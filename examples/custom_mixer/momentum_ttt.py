"""TTT-Linear whose inner gradient has momentum and whose state decays, in the spirit of Titans
(arXiv 2501.00663). Both rates are learned, one per head.

The outputs of a mini-batch are TTT-Linear's. Then, with g the sum of its gradient steps,

    S <- momentum S + g,    W <- (1 - decay) W - S,

and the same for b. A run needs `model.mixer_modules: [examples.custom_mixer.momentum_ttt]`, which
imports this file; docs/mixers.md builds it step by step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megatron_ttt.errors import UserError
from megatron_ttt.mixers import register_mixer
from megatron_ttt.mixers.base import Dimensions, Microbatch, Parameter
from megatron_ttt.mixers.hf_code import HFCode
from megatron_ttt.mixers.module import mixer_spec
from megatron_ttt.mixers.ttt import HF_FILES
from megatron_ttt.mixers.ttt.inner_model import InnerModel
from megatron_ttt.mixers.ttt.layer import TTTMixer
from megatron_ttt.mixers.ttt.linear.reference import mini_batch, predict
from megatron_ttt.mixers.ttt.mixer import TTT
from megatron_ttt.mixers.ttt.options import TTTOptions


@dataclass
class MomentumOptions(TTTOptions):
    """TTT-Linear's options, and the rates that training starts from."""

    momentum: float = 0.3
    """Initial momentum of the inner gradient, between 0 and 1."""
    decay: float = 0.02
    """Initial decay of the state in a mini-batch, between 0 and 1."""


RATES = ("momentum", "decay")
"""A rate is the sigmoid of a parameter with one number a head: `momentum_logit`, `decay_logit`."""


def state_shapes(head_dim: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of one head's state: W, b and their momentum; all initial values are
    learned."""
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


def filled_with_logit(rate: float):
    """Return an initialiser that fills with the number whose sigmoid is `rate`."""
    return lambda tensor, generator: tensor.fill_(math.log(rate / (1 - rate)))


class MomentumLayer(TTTMixer):
    """TTT-Linear's layer with MOMENTUM as its inner model."""

    def inner_model(self) -> InnerModel:
        """Return the inner model with this layer's rates, one per head."""
        rates = (torch.sigmoid(getattr(self, f"{name}_logit"))[:, None, None] for name in RATES)
        return replace(MOMENTUM, mini_batch=partial(momentum_mini_batch, *rates))


class MomentumTTT(TTT):
    """What the mixer says of itself, where that differs from TTT-Linear."""

    Options = MomentumOptions

    def validate(self, dims: Dimensions, options: MomentumOptions) -> None:
        """Raise UserError for options out of range."""
        super().validate(dims, options)
        for name in RATES:
            if not 0 < getattr(options, name) < 1:
                raise UserError(f"mixers.{self.name}.{name} must be between 0 and 1")

    def parameters(self, dims: Dimensions, options: MomentumOptions) -> list[Parameter]:
        """Return TTT-Linear's table with the state's momentum and the two rates of each head."""
        rates = [
            Parameter(
                f"{name}_logit",
                (dims.num_heads,),
                filled_with_logit(getattr(options, name)),
                (f"{self.hf_module}.{name}_logit",),
                shard_dim=0,
                fp32=True,
            )
            for name in RATES
        ]
        return [*super().parameters(dims, options), *rates]

    def spec(self, options: MomentumOptions, backend: str = "auto"):
        """Return the spec of the module."""
        return mixer_spec(MomentumLayer, self, options, "naive")

    def unsupported_reason(self, dims, options, *, backend, **_) -> str | None:
        """Return why a backend cannot run: only the reference is implemented."""
        return None if backend in ("auto", "naive") else "momentum_ttt has only naive"

    def saved_state_bytes(self, options: MomentumOptions, batch: Microbatch) -> float:
        """Return the bytes that autograd saves of the scan: W and S of every mini-batch, and the
        float32 tensors between them."""
        f, K = batch.dims.head_dim, options.mini_batch_size
        heads = batch.sequences * batch.dims.num_heads / batch.tp
        return heads * batch.seq_length * 4 * (2 * f * f / K + 9 * f + 4 * K)

    def hf_model(self, dims: Dimensions, options: MomentumOptions) -> None:
        """Return None: there is no official form of config.json."""

    def options_of_hf_model(self, config) -> None:
        """Return None, for the same reason."""


HF_CODE = HFCode(Path(__file__).parent / "mixer_momentum_ttt.py", "MomentumTTT", needs=HF_FILES)
MOMENTUM_TTT = register_mixer(
    MomentumTTT("momentum_ttt", "TTT-Linear with momentum", MOMENTUM, HF_CODE)
)
