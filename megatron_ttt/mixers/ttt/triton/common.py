"""What the kernels of both inner models share: tiles of tokens, LayerNorm, the loss, products.

Tiles are transposed: the rows are features, the columns the K tokens of a mini-batch. A product's
rows are what tensor cores and warps divide among them, and 16 tokens would be too few: every warp
would hold, and compute, all of them. The F features are padded to a power of two P (96 becomes
128). Padded rows, and columns past the end of a ragged mini-batch, are zero wherever they could be
summed.

Signatures: a name with sizes (W1_ACFM) points to contiguous memory, but for the tokens (q, k, v,
out and their gradients, [B, H, L, F]) and the initial state ([B, H, ...]): of these, x_b, x_h and
x_l are the strides of batch, head and sequence, and features are adjacent. All is float32 but
tokens, and what products alone read again (G, G1, G2, X2), which has DOT, their operands' dtype.

Sizes: B batch, H heads, A = B * H heads of sequences, L sequence, F head dim, P >= F a power of
two, K mini-batch, GROUP mini-batches from one kept state to the next, C = ceil(ceil(L / K) / GROUP)
kept states, M hidden width of TTT-MLP. L, C and H are known when a kernel runs, the others when it
is compiled. `crowded` is for the autotuner alone.
"""

import torch
import triton
import triton.language as tl

from megatron_ttt.ops.triton.common import padded

GROWTH = tl.constexpr(32)
"""How much larger weights may be after a group whose steps are taken back; see ../workspace.py."""
MULTIPROCESSORS = 132
"""Of an H100; an A100 has 108."""
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
def of_head(tau_K, gamma_HF, beta_HF, head, index, features, F: tl.constexpr, K: tl.constexpr):
    """What stays the same over a head's mini-batches: the causal mask [key, query], tau, its last
    entry, and gamma and beta [P, 1]."""
    causal = index[:, None] <= index[None, :]
    tau = tl.load(tau_K + index)
    tau_last = tl.load(tau_K + K - 1)
    gamma = tl.load(gamma_HF + head * F + features, mask=features < F, other=0.0)
    beta = tl.load(beta_HF + head * F + features, mask=features < F, other=0.0)
    return causal, tau, tau_last, gamma, beta


@triton.jit
def load_tokens(pointer, features, tokens, stride, inside):
    """A tile [P, K] of tokens in float32, zeros where not `inside`."""
    return tl.load(pointer + tokens * stride + features, mask=inside, other=0).to(tl.float32)


@triton.jit
def mean(x, F: tl.constexpr):
    """Over the features, [P, K] to [1, K]."""
    return (tl.sum(x, 0) / F)[None, :]


@triton.jit
def normalise(Z, features, F: tl.constexpr, P: tl.constexpr):
    """LayerNorm without its affine part, and 1/s: [P, K] and [1, K]."""
    centred = Z - mean(Z, F)
    if F != P:
        centred = tl.where(features < F, centred, 0.0)
    rstd = tl.rsqrt(mean(centred * centred, F) + LN_EPS)
    return centred * rstd, rstd


@triton.jit
def project(y, hat, rstd, features, F: tl.constexpr, P: tl.constexpr):
    """LayerNorm's backward, Pi(y)."""
    y = (y - mean(y, F) - hat * mean(y * hat, F)) * rstd
    if F != P:
        y = tl.where(features < F, y, 0.0)
    return y


@triton.jit
def inner_gradient_backward(
    dG, G, hat, rstd, residual, gamma, beta, features, F: tl.constexpr, P: tl.constexpr
):
    """Second order, docs/mathematics.md, backward, step 4: from dG to dZ, du and what sums to
    dgamma. residual = x - v."""
    du = project(dG, hat, rstd, features, F, P)
    fit = gamma * hat + beta
    h = mean(gamma * (fit + residual) * hat, F)
    dZ = project(gamma * gamma * du - h * rstd * dG, hat, rstd, features, F, P)
    dZ -= rstd * (mean(dG * hat, F) * G + mean(dG * G, F) * hat)
    return dZ, du, du * (fit + residual + gamma * hat)


def autotuned(choices: list[dict], key: list[str]):
    """Time these choices of `num_warps` (and BM) once a kind of GPU and `key`; remember the best on
    disk. Where PyTorch is to be deterministic the first that fits is taken, untimed: another choice
    adds up in another order.

    Loops are not software-pipelined (one stage): Triton would load state that a kernel keeps in
    memory ahead of the mini-batch that writes it.
    """
    configs = [
        triton.Config(
            {name: value for name, value in choice.items() if name != "num_warps"},
            num_warps=choice["num_warps"],
            num_stages=1,
        )
        for choice in choices[: 1 if INTERPRETED.value else None]
    ]
    prune = {"early_config_prune": worth_trying}
    return triton.autotune(configs, key, prune_configs_by=prune, cache_results=True)


def worth_trying(
    configs: list[triton.Config], _, *, P: int, M: int = 0, BM: int | None = None, DOT=None, **__
) -> list[triton.Config]:
    """Those that give a float32 tile of state at most 32 registers a thread, and blocks no more
    hidden units than there are; else the second choice, made for large heads. Of float32 operands
    those of 8 warps: products are unrolled then, and with 4 spill up to 13 KB a thread."""

    def fits(config: triton.Config) -> bool:
        rows = config.kwargs.get("BM", BM or P)
        return 32 * 32 * config.num_warps >= rows * P and (M == 0 or padded(M) >= rows)

    fitting = list(filter(fits, configs)) or configs[1:2]
    if DOT is tl.float32:
        fitting = [config for config in configs if config.num_warps == 8] or fitting
    return fitting[:1] if torch.are_deterministic_algorithms_enabled() else fitting


def crowded(programs: int) -> int:
    """Whether multiprocessors have several programs: what is fastest then may not be for few. For
    the autotuner's key."""
    return int(programs > MULTIPROCESSORS)


def operand_dtype(*tokens: torch.Tensor) -> torch.dtype:
    """In which products take their operands: bfloat16 if all tokens are."""
    return torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in tokens) else torch.float32


def kept_states(L: int, K: int, group: int) -> int:
    """How many states are kept of a sequence."""
    return triton.cdiv(triton.cdiv(L, K), group)


def strides(*tokens: torch.Tensor) -> list[int]:
    """Of batch, head and sequence; features are adjacent."""
    return [stride for x_BHLF in tokens for stride in x_BHLF.stride()[:3]]


def new(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised float32."""
    return like.new_empty(shape, dtype=torch.float32)
