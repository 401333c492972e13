"""What the kernels of both inner models share: tiles of tokens, LayerNorm, the loss, products.

A tile's rows are the K tokens of a mini-batch, its columns the F features padded to a power of two
P (96 becomes 128). Padded columns, and the rows past the end of a ragged mini-batch, are zero
wherever they could be summed.
"""

import torch
import triton
import triton.language as tl

GROUP = 16
"""Mini-batches from one kept state to the next."""
TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
LN_EPS = tl.constexpr(1e-6)


@triton.jit
def operand(x, DOT: tl.constexpr):
    """`x` rounded to DOT, the dtype in which products take their operands, and back to float32."""
    return x.to(DOT).to(tl.float32)


# Triton's interpreter multiplies bfloat16 operands wrongly, and silently.
INTERPRETED = tl.constexpr(not isinstance(operand, triton.JITFunction))


@triton.jit
def dot(a, b, DOT: tl.constexpr):
    """a @ b with operands in DOT, summed in float32; all products pass through here."""
    a, b = a.to(DOT), b.to(DOT)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")  # float32 would else be TF32


@triton.jit
def load_tokens(pointer, rows, row_stride, columns, inside):
    """A tile of tokens in float32, zeros where not `inside`."""
    return tl.load(pointer + rows * row_stride + columns, mask=inside, other=0).to(tl.float32)


@triton.jit
def normalise(Z, columns, F: tl.constexpr, P: tl.constexpr):
    """LayerNorm without its affine part, and 1/s, [K, P] and [K, 1]."""
    centred = Z - (tl.sum(Z, 1) / F)[:, None]
    if F != P:
        centred = tl.where(columns < F, centred, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / F + LN_EPS)[:, None]
    return centred * rstd, rstd


@triton.jit
def project(y, hat, rstd, columns, F: tl.constexpr, P: tl.constexpr):
    """LayerNorm's backward, Pi(y)."""
    mean = (tl.sum(y, 1) / F)[:, None]
    along = (tl.sum(y * hat, 1) / F)[:, None]
    y = (y - mean - hat * along) * rstd
    if F != P:
        y = tl.where(columns < F, y, 0.0)
    return y


@triton.jit
def inner_gradient_backward(
    dG, G, hat, rstd, residual, gamma, beta, columns, F: tl.constexpr, P: tl.constexpr
):
    """Second order, docs/mathematics.md, backward, step 4: from dG to dZ, du and the rows whose
    sum is dgamma. residual = x - v."""
    du = project(dG, hat, rstd, columns, F, P)
    fit = gamma * hat + beta
    u = gamma * (fit + residual)
    h = (tl.sum(u * hat, 1) / F)[:, None]
    c = (tl.sum(dG * hat, 1) / F)[:, None]
    e = (tl.sum(dG * G, 1) / F)[:, None]
    dZ = project(gamma * gamma * du - h * rstd * dG, hat, rstd, columns, F, P)
    return dZ - rstd * (c * G + e * hat), du, du * (fit + residual + gamma * hat)


def autotuned(warps: tuple[int, ...], key: list[str]):
    """Try these numbers of warps once a device and `key`, and remember the best on disk.

    Loops are not software-pipelined (one stage): Triton would load state that a kernel keeps in
    memory ahead of the mini-batch that writes it.
    """
    if INTERPRETED.value:
        warps = warps[:1]
    configs = [triton.Config({}, num_warps=w, num_stages=1) for w in warps]
    return triton.autotune(configs, key, cache_results=True)


def operand_dtype(*tokens: torch.Tensor) -> torch.dtype:
    """In which products take their operands: bfloat16 if all tokens are."""
    return torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in tokens) else torch.float32


def padded(width: int) -> int:
    """The power of two a tile of `width` takes."""
    return triton.next_power_of_2(width)


def kept_states(L: int, K: int, group: int) -> int:
    """How many states are kept of a sequence."""
    return triton.cdiv(triton.cdiv(L, K), group)


def strides(*tokens: torch.Tensor) -> list[int]:
    """Of batch, head and sequence; features are adjacent."""
    return [stride for x_BHLF in tokens for stride in x_BHLF.stride()[:3]]


def new(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised float32."""
    return like.new_empty(shape, dtype=torch.float32)
