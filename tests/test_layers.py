"""Layers against torch's own, forward and backward, in float64."""

import types

import pytest
import torch
import torch.nn.functional as F
from harness import relative


@pytest.fixture
def core(cpu_platform):
    return types.SimpleNamespace(
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        perform_initialization=True,
        sequence_parallel=False,
        layernorm_epsilon=1e-6,
    )


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_causal_conv_is_conv1d(core):
    from megatron_ttt.layers.conv import conv_weights
    from megatron_ttt.ops.conv_rope import causal_conv

    weight, bias = randomise(conv_weights(core, 6, 4))()
    x = torch.randn(9, 2, 6, dtype=torch.float64, requires_grad=True)
    ours = causal_conv(x, weight, bias)
    theirs = F.conv1d(F.pad(x.permute(1, 2, 0), (3, 0)), weight, bias, groups=6)
    theirs = theirs.permute(2, 0, 1)
    assert relative(ours, theirs) < 1e-14
    upstream = torch.randn_like(ours)
    inputs = (x, weight, bias)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)
    ):
        assert relative(a, b) < 1e-13


def test_causal_conv_goes_on_from_a_halo(core):
    from megatron_ttt.layers.conv import conv_weights
    from megatron_ttt.ops.conv_rope import causal_conv

    weights = randomise(conv_weights(core, 6, 4))()
    x = torch.randn(12, 2, 6, dtype=torch.float64)
    parts = torch.cat([causal_conv(x[:5], *weights), causal_conv(x[5:], *weights, x[2:5])])
    assert relative(parts, causal_conv(x, *weights)) < 1e-14


def test_rms_norm_casts_before_its_weight(core):
    from megatron_ttt.layers.norm import RMSNorm

    core.params_dtype = torch.bfloat16
    norm = randomise(RMSNorm(core, 64))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), normalised.bfloat16() * norm.weight)


def test_sharded_layer_norm_is_layer_norm(core):
    """On one rank, where it is never taken: the formulas, without the exchange."""
    from megatron.core import parallel_state

    from megatron_ttt.ops.sharded_layer_norm import ShardedLayerNorm

    x = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    group = parallel_state.get_tensor_model_parallel_group()
    ours = ShardedLayerNorm.apply(x, weight, bias, 1e-6, group)
    theirs = F.layer_norm(x, (8,), weight, bias, 1e-6)
    assert relative(ours, theirs) < 1e-14
    upstream = torch.randn_like(ours)
    inputs = (x, weight, bias)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)
    ):
        assert relative(a, b) < 1e-12


def test_rope_turns_pairs_by_their_place_in_the_mini_batch():
    from megatron_ttt.ops.rope import mini_batch_angles, rotate_pairs

    x = torch.randn(3, 40, 8, dtype=torch.float64)
    angles = mini_batch_angles(16, 8, 10000.0, torch.float64, x.device)
    turned = torch.view_as_complex(rotate_pairs(x, *angles).unflatten(-1, (4, 2)))
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    for token in (0, 5, 16, 37):
        angle = (token % 16) * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        assert torch.allclose(turned[:, token], pairs[:, token] * torch.exp(1j * angle))


def test_masked_loss_is_averaged_by_sequence_first():
    from megatron_ttt.training.step import sequence_mean_loss

    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], [5.0, 5.0, 5.0, 5.0]])
    labels = torch.tensor([[7, 1, 7, 7], [1, 1, 1, 7], [1, 1, 1, 1]])
    expected = ((1 + 3 + 4) / 3 + 40 + 0) / 3
    assert sequence_mean_loss(losses, labels, 1).item() == pytest.approx(expected)
    assert sequence_mean_loss(losses, labels, None).item() == pytest.approx(losses.mean().item())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("switches", ["true", "false"])
def test_every_module_with_parameters_is_called(cpu_platform, monkeypatch, switches, fused):
    """DDP waits in front of these calls for weights that are still on their way."""
    from megatron_ttt.config import load_config
    from megatron_ttt.layers import conv, norm
    from megatron_ttt.model import build_chunks, initialise_weights, make_transformer_config
    from megatron_ttt.ops.triton import layernorm_gate, rmsnorm_conv
    from megatron_ttt.stack import architecture_of

    if fused:
        monkeypatch.setattr(conv, "can_use_fused_kernels", lambda x: True)
        monkeypatch.setattr(norm, "can_use_fused_kernels", lambda x: True)
        monkeypatch.setattr(rmsnorm_conv, "rmsnorm_conv", lambda h, *weights: h)
        monkeypatch.setattr(layernorm_gate, "layernorm_gate", lambda x, *others: x)
    names = ("use_gate", "share_qk", "pre_conv")
    options = [f"mixers.ttt_linear.{name}={switches}" for name in names]
    config = load_config(["yaml_recipes/debug_cpu.yaml"], options)
    (chunk,) = build_chunks(config, make_transformer_config(config, cpu_platform))
    initialise_weights(chunk, architecture_of(config), seed=0)
    called = set()
    for name, module in chunk.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        chunk(ids, None, None, labels=ids)
    owners = {name for name, module in chunk.named_modules() if list(module.parameters(False))}
    assert len(owners) > 10 and owners <= called, owners - called
