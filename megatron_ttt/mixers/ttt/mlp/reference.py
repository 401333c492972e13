"""A mini-batch of TTT-MLP as the paper writes it; see `../reference.py` for names and sizes."""

import torch
import torch.nn.functional as F

from megatron_ttt.mixers.ttt.reference import inner_gradient, learning_rates, normalise, step


def mini_batch(q, x, v, lam, tau, gamma, beta, state):
    """Return the outputs and the next state."""
    W1, b1, W2, b2 = state
    Z1 = x @ W1 + b1
    X2 = F.gelu(Z1, approximate="tanh")
    G2 = inner_gradient(X2 @ W2 + b2, v - x, gamma, beta)
    G1 = (G2 @ W2.mT) * gelu_derivative(Z1)

    eta = learning_rates(tau, lam)
    P1 = eta * (q @ x.mT + 1)
    X2bar = F.gelu(q @ W1 + b1 - P1 @ G1, approximate="tanh")
    P2 = eta * (X2bar @ X2.mT + 1)
    output = q + gamma * normalise(X2bar @ W2 + b2 - P2 @ G2)[0] + beta
    return output, step(x, G1, lam, tau, W1, b1) + step(X2, G2, lam, tau, W2, b2)


def predict(x, state):
    """Return the inner model's output before its LayerNorm."""
    W1, b1, W2, b2 = state
    return F.gelu(x @ W1 + b1, approximate="tanh") @ W2 + b2


def gelu_derivative(x):
    """Return gelu' as the official code has it, with sqrt(2/pi) rounded to eight digits."""
    c, a = 0.79788456, 0.044715
    t = torch.tanh(c * x * (1 + a * x * x))
    return x / 2 * (1 - t * t) * (c + 3 * a * c * x * x) + (1 + t) / 2
