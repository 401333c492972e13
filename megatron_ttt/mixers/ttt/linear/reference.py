"""A mini-batch of TTT-Linear as the paper writes it; see `../reference.py` for names and sizes."""

from megatron_ttt.mixers.ttt.reference import inner_gradient, learning_rates, normalise, step


def mini_batch(q, x, v, lam, tau, gamma, beta, state):
    """Return the outputs and the next state."""
    W, b = state
    G = inner_gradient(x @ W + b, v - x, gamma, beta)
    P = learning_rates(tau, lam) * (q @ x.mT + 1)
    output = q + gamma * normalise(q @ W + b - P @ G)[0] + beta
    return output, step(x, G, lam, tau, W, b)


def predict(x, state):
    """Return the inner model's output before its LayerNorm."""
    W, b = state
    return x @ W + b
