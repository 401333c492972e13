"""TTT layers in a GPTModel of megatron-core's own, without the trainer and its configuration."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import ROOT, run, torchrun

from megatron_ttt.errors import UserError

SCRIPT = ROOT / "tests/plain_gpt_model.py"
FP32 = ("W1", "b1", "W2", "b2", "learnable_", "ttt_norm_")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """What both ranks of both sides wrote."""
    folder = tmp_path_factory.mktemp("plain")
    torchrun(2, SCRIPT, "trainer", folder)
    # A fork would have the trainer's modules.
    run([sys.executable, SCRIPT, "plain", folder], ranks=2, forked=False)
    return {
        side: [torch.load(folder / f"{side}-{rank}.pt") for rank in range(2)]
        for side in ("trainer", "plain")
    }


@pytest.mark.parametrize("case", ["plain", "own_group", "sequence_parallel"])
def test_a_plain_model_trains_like_the_trainers(sides, case):
    """own_group: tensor parallelism from the given process groups; sequence_parallel: with full
    recomputation, too."""
    for trainer, plain in zip(sides["trainer"], sides["plain"]):
        assert plain[case]["losses"] == pytest.approx(trainer["losses"], abs=1e-6)
        for name, weight in trainer["end"].items():
            assert not torch.equal(weight, trainer["start"][name]), name
            torch.testing.assert_close(plain[case]["end"][name], weight, rtol=0, atol=1e-6)


def test_the_trainers_configuration_is_not_imported(sides):
    imported = sides["plain"][0]["imported"]
    assert "megatron_ttt.mixers.ttt.layer" in imported
    assert not [name for name in imported if name.startswith("megatron_ttt.training")]
    assert "megatron_ttt.config" not in imported and "megatron_ttt.model" not in imported


@pytest.mark.parametrize("drawn", ["drawn_whole", "drawn_in_parts"])
def test_layers_start_themselves(sides, drawn):
    """Whole on each rank and then cut, as on a CPU, or each rank's part, as on GPUs."""
    first, second = (side[drawn] for side in sides["plain"])
    stds = {"learnable_ttt_lr_weight": 0.02, "W1": 0.02, "conv.weight": 0.5}
    stds |= {"conv_q.weight": 0.5, "conv_k.weight": 0.5}
    drawn_parameters = set()
    for name, cut in sides["plain"][0]["cut"].items():
        one, other = first[name], second[name]
        std = next((std for end, std in stds.items() if name.endswith(end)), None)
        if std is None:
            ones = "norm" in name and name.endswith("weight")
            assert torch.equal(one, torch.full_like(one, 1.0 if ones else 0.0)), name
            assert torch.equal(one, other), name
            continue
        drawn_parameters.add(name)
        assert torch.equal(one, other) is not cut, name
        both = torch.cat([one, other]) if cut else one
        # Five standard errors.
        assert both.std().item() == pytest.approx(std, rel=5 * (2 * both.numel()) ** -0.5), name
        assert abs(both.mean().item()) < 5 * std * both.numel() ** -0.5, name
    assert len(drawn_parameters) == 2 * len(stds)


def core_config(platform, **options):
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "hidden_dropout": 0.0}
    return TransformerConfig(
        **{**sizes, "normalization": "RMSNorm", **platform.core_overrides, **options}
    )


def gpt_model(config, spec):
    from megatron.core.models.gpt.gpt_model import GPTModel

    return GPTModel(config, spec, 96, 40, position_embedding_type="none")


def tokens(length=40):
    return torch.randint(96, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("inner_model", ["linear", "mlp"])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_the_inner_model_stays_in_float32(cpu_platform, inner_model, given):
    """Whether the parameters are made in bfloat16 or cast to it."""
    from megatron.core.transformer.module import Float16Module

    from megatron_ttt.mixers import ttt_layer_spec

    config = core_config(cpu_platform, bf16=True, params_dtype=given)
    plain = gpt_model(config, ttt_layer_spec(inner_model))
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = Float16Module(config, plain)
    in_float32 = 0
    for name, parameter in plain.named_parameters():
        kept = name.split("self_attention.")[-1].startswith(FP32)
        in_float32 += kept
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(parameter, start[name].to(parameter.dtype)), name
    assert in_float32 == {"linear": 7, "mlp": 9}[inner_model]
    model(tokens(), None, None, labels=tokens()).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in plain.parameters())


@pytest.mark.parametrize("fills", [True, False])
def test_perform_initialization(cpu_platform, fills):
    """Without it nothing is written into parameters; torch marks such memory with NaN."""
    from megatron_ttt.mixers import ttt_mlp_spec

    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        model = gpt_model(core_config(cpu_platform, perform_initialization=fills), ttt_mlp_spec)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    for name, parameter in model.decoder.layers.named_parameters():
        if not name.endswith(("bias", "proj.weight", "fc1.weight", "fc2.weight")):
            assert parameter.isnan().any().item() is not fills, name


@pytest.mark.parametrize("chosen", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("inner_model", ["linear", "mlp"])
def test_every_choice_of_options(cpu_platform, inner_model, chosen):
    from megatron_ttt.mixers import ttt_layer_spec

    options = dict(zip(("use_gate", "share_qk", "pre_conv"), chosen))
    model = gpt_model(core_config(cpu_platform), ttt_layer_spec(inner_model, **options))
    (layer,) = model.decoder.layers
    assert layer.self_attention.options.base_lr == {"linear": 1.0, "mlp": 0.1}[inner_model]
    assert (layer.pre_conv is not None) is options["pre_conv"]
    assert hasattr(layer.self_attention, "conv_q") is options["share_qk"]
    loss = model(tokens(), None, None, labels=tokens()).mean()
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_unknown_options():
    from megatron_ttt.mixers import ttt_layer_spec

    with pytest.raises(ValueError, match=r"unknown inner model 'rnn': choose one of linear, mlp"):
        ttt_layer_spec("rnn")
    with pytest.raises(TypeError, match="preconv"):
        ttt_layer_spec(preconv=False)


def refusal(call, *arguments, **options) -> str:
    """The message of a refusal, which is one line."""
    with pytest.raises(UserError) as refused:
        call(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture(scope="module")
def model(cpu_platform):
    from megatron_ttt.mixers import ttt_linear_spec

    return gpt_model(core_config(cpu_platform), ttt_linear_spec)


def test_packed_sequences_are_refused(model):
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, 25, 40], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    message = refusal(model, tokens()[:1], None, None, packed_seq_params=packed)
    assert message.startswith("packed_seq_params is not supported by TTT layers: ")


def test_a_context_is_refused(model):
    context = {"context": torch.zeros(3, 2, 32)}
    message = refusal(model, tokens(), None, None, extra_block_kwargs=context)
    assert message.startswith("a context is given")


@pytest.mark.parametrize(
    "name",
    ["key_value_states", "inference_context", "inference_params", "attention_bias"],
)
def test_what_attention_takes_is_refused(model, name):
    mixer = model.decoder.layers[0].self_attention
    message = refusal(mixer, torch.zeros(40, 2, 32), **{name: SimpleNamespace()})
    assert message.startswith(f"{name} is not supported by TTT layers: ")


def test_unknown_arguments_are_errors(model):
    from megatron_ttt.layers.norm import RMSNorm

    with pytest.raises(TypeError, match="something_new"):
        model.decoder.layers[0].self_attention(torch.zeros(40, 2, 32), something_new=None)
    with pytest.raises(TypeError, match="something_new"):
        RMSNorm(model.config, 32, something_new=True)


def test_masks_that_are_not_causal_are_refused(model):
    causal = torch.ones(40, 40, dtype=torch.bool).triu(1).expand(2, 1, 40, 40)
    without = model(tokens(), None, None)
    for mask in (causal, causal.clone()[:1]):
        for _ in range(2):
            assert torch.equal(model(tokens(), None, mask), without)
    document_end, prefix, window = causal.clone(), causal.clone(), causal.clone()
    document_end[1, :, 25:, :25] = True
    prefix[..., :8, :8] = False
    window[..., 39, 3] = True
    for mask in (document_end, prefix, window, causal.float()):
        message = refusal(model, tokens(), None, mask)
        assert message.startswith("attention_mask is not the causal one")


@pytest.mark.parametrize(
    "option",
    [
        {"normalization": "LayerNorm"},
        {"layernorm_zero_centered_gamma": True},
        {"context_parallel_size": 2},
    ],
)
def test_configurations_that_are_refused(cpu_platform, option):
    from megatron_ttt.mixers import ttt_linear_spec

    config = core_config(cpu_platform, **option)
    ((name, value),) = option.items()
    assert f"{name}={value}" in refusal(gpt_model, config, ttt_linear_spec)


def test_a_half_precision_model_may_come_back(cpu_platform):
    """To float64 its own parameters go like any."""
    from megatron_ttt.mixers import ttt_linear_spec

    model = gpt_model(core_config(cpu_platform), ttt_linear_spec)
    assert {p.dtype for p in model.half().parameters()} == {torch.float16, torch.float32}
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}
    logits = model(tokens(), None, None)
    assert F.softmax(logits, -1).isfinite().all()
