"""TTT-Linear with momentum and decay, for transformers: this file goes into every export."""

import math

import torch
from torch import nn

from .inner_loop_ttt import linear_step
from .mixer_ttt import TTTLinear

RATES = ("momentum", "decay")
LOGITS = tuple(f"{name}_logit" for name in RATES)


class MomentumTTT(TTTLinear):
    """TTT-Linear whose inner gradient has momentum and whose state decays."""

    inner_model = None
    fp32_names = (*TTTLinear.fp32_names, "momentum_W1", "momentum_b1", *LOGITS)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        for name in self.trained_names:
            momentum = nn.Parameter(torch.zeros_like(getattr(self, name)))
            setattr(self, f"momentum_{name}", momentum)
            self.state_names.append(f"momentum_{name}")
        for name in LOGITS:
            setattr(self, name, nn.Parameter(torch.zeros(self.heads)))

    def init_parameter(self, name: str, parameter, std: float) -> None:
        if name in LOGITS:
            rate = getattr(self.options, name.removesuffix("_logit"))
            parameter.fill_(math.log(rate / (1 - rate)))
        else:
            super().init_parameter(name, parameter, std)

    @staticmethod
    def step(q, x, v, lam, tau, gamma, beta, state, sums):
        return linear_step(q, x, v, lam, tau, gamma, beta, state[:2], sums)

    def close(self, state, steps):
        rates = (torch.sigmoid(getattr(self, name))[:, None, None] for name in LOGITS)
        momentum, decay = (rate.to(state[0].dtype) for rate in rates)
        trained, averages = state[:2], state[2:]
        averages = [momentum * S + step for S, step in zip(averages, steps)]
        trained = [(1 - decay) * W - S for W, S in zip(trained, averages)]
        return (*trained, *averages)
