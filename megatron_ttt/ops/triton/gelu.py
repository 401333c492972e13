"""The tanh approximation of GELU and its derivatives, by its gate g: gelu(z) = z g."""

import triton
import triton.language as tl

CUBIC = tl.constexpr(0.044715)
TWICE_C = tl.constexpr(2 * 0.7978845608028654)  # 2 sqrt(2 / pi)


@triton.jit
def gelu_gate(z):
    """g = sigmoid(2c (z + a z^3))."""
    return 1 / (1 + tl.exp(z * (1 + z * z * CUBIC) * -TWICE_C))


@triton.jit
def gelu_slope(z):
    """The slope p of the gate's argument."""
    return (1 + z * z * (3 * CUBIC)) * TWICE_C


@triton.jit
def gelu_derivative(z, gate):
    return gate + z * gate * (1 - gate) * gelu_slope(z)


@triton.jit
def gelu_second_derivative(z, gate):
    p = gelu_slope(z)
    return gate * (1 - gate) * (2 * p + z * z * (6 * CUBIC * TWICE_C) + (1 - 2 * gate) * z * p * p)
