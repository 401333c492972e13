"""TTT-MLP in Triton, forward and backward (docs/mathematics.md).

As in `../linear/kernels.py` one program takes one head of one sequence, nothing crosses programs,
and the backward takes the steps back from kept states. Its state is the difficulty: W1 and W2 are
128 KiB in float32 at F = 64, four such with their gradients 256 KiB, all the registers of a
multiprocessor; at F = 96 they are 288 and 576 KiB.

- The state lives in global memory, which for the programs that run at a time is the L2 cache
  (132 x 256 KiB = 33 MiB at F = 64), and blocks of BM hidden units pass through the registers. The
  hidden units meet only in sums over M: once for G2 and once for the output, so a mini-batch is two
  passes over the blocks.
- Where both W fit in the registers (F <= 64), the forward may hold them there, RESIDENT, all M
  hidden units one block. That saves 384 KiB of traffic a mini-batch and leaves a multiprocessor one
  program of 16 warps, 128 registers a thread and 1.2 KiB of them spilled (sm_90), where blocks of
  64 run in 4 warps and spill 0.2 KiB. Which is faster is for autotuning to say.
- The hidden units of one head are not spread over programs: these would have to meet twice in every
  mini-batch through global memory, and in training batch times heads mostly fills the device.
- Kept are, of each token, X2, G1 and G2 as the products see them (exact steps back want the very
  operands), Z2, Zbar2 and S2: 27 KiB a mini-batch (K = 16, F = 64, bf16), and every GROUP
  mini-batches the state, 8 KiB a mini-batch at 16. Every state would be 129 KiB. Without Z2, Zbar2
  and S2 the backward would make a third pass over the blocks.

Here is what the two passes, `forward_kernel.py` and `backward_kernel.py`, share. Names and sizes
are those of `../triton/common.py`; BM is the hidden units of a block, and tiles of both W are
[BM, P].
"""

import triton
import triton.language as tl


@triton.jit
def load_in(W1_FM, b1_M, m, units, features, F: tl.constexpr, M: tl.constexpr):
    """What leads into hidden units m.. of a state (or its gradient): W1 transposed [BM, P], b1
    [BM, 1]."""
    here = m + units < M
    W1 = tl.load(W1_FM + features * M + m + units, mask=here & (features < F), other=0.0)
    return W1, tl.load(b1_M + m + units, mask=here, other=0.0)


@triton.jit
def load_out(W2_MF, m, units, features, F: tl.constexpr, M: tl.constexpr):
    """What leads out of them: W2 [BM, P]."""
    inside = (m + units < M) & (features < F)
    return tl.load(W2_MF + (m + units) * F + features, mask=inside, other=0.0)


@triton.jit
def store_in(W1_FM, b1_M, W1, b1, m, units, features, F: tl.constexpr, M: tl.constexpr):
    here = m + units < M
    tl.store(W1_FM + features * M + m + units, W1, mask=here & (features < F))
    tl.store(b1_M + m + units, b1, mask=here)


@triton.jit
def store_out(W2_MF, W2, m, units, features, F: tl.constexpr, M: tl.constexpr):
    inside = (m + units < M) & (features < F)
    tl.store(W2_MF + (m + units) * F + features, W2, mask=inside)


@triton.jit
def load_block(W1_FM, b1_M, W2_MF, m, units, features, F: tl.constexpr, M: tl.constexpr):
    W1, b1 = load_in(W1_FM, b1_M, m, units, features, F, M)
    return W1, b1, load_out(W2_MF, m, units, features, F, M)


@triton.jit
def store_block(
    W1_FM, b1_M, W2_MF, W1, b1, W2, m, units, features, F: tl.constexpr, M: tl.constexpr
):
    store_in(W1_FM, b1_M, W1, b1, m, units, features, F, M)
    store_out(W2_MF, W2, m, units, features, F, M)


@triton.jit
def copy_state(
    to_W1, to_b1, to_W2, W1_FM, b1_M, W2_MF, units, features,
    F: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    for m in range(0, M, BM):
        W1, b1, W2 = load_block(W1_FM, b1_M, W2_MF, m, units, features, F, M)
        store_block(to_W1, to_b1, to_W2, W1, b1, W2, m, units, features, F, M)


@triton.jit
def squares(W1_FM, W2_MF, units, features, F: tl.constexpr, M: tl.constexpr, BM: tl.constexpr):
    """The sums of the squares of W1 and of W2."""
    of_W1, of_W2 = 0.0, 0.0
    for m in range(0, M, BM):
        here = m + units < M
        W1 = tl.load(W1_FM + features * M + m + units, mask=here & (features < F), other=0.0)
        of_W1 += tl.sum(W1 * W1)
        W2 = load_out(W2_MF, m, units, features, F, M)
        of_W2 += tl.sum(W2 * W2)
    return of_W1, of_W2
