"""The Transformer baseline is transformers' Llama: logits and gradients, float64."""

import torch
import torch.nn.functional as F
from harness import ROOT, relative

from megatron_ttt.config import load_config


def to_llama(name: str, tensor: torch.Tensor, heads: int) -> dict[str, torch.Tensor]:
    """Our tensor (or its gradient) under Llama's names; q, k, v lie head by head in ours."""
    if name == "embedding.word_embeddings.weight":
        return {"model.embed_tokens.weight": tensor}
    if name == "decoder.final_layernorm.weight":
        return {"model.norm.weight": tensor}
    _, _, number, tail = name.split(".", 3)
    prefix = f"model.layers.{number}."
    if tail == "self_attention.linear_qkv.weight":
        packed = tensor.unflatten(0, (heads, 3, -1))
        return {
            f"{prefix}self_attn.{part}_proj.weight": packed[:, i].flatten(0, 1)
            for i, part in enumerate("qkv")
        }
    if tail == "mlp.linear_fc1.weight":
        gate, up = tensor.chunk(2)
        return {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
    renamed = {
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    }
    return {prefix + renamed[tail]: tensor}


def test_is_llama(cpu_platform):
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_ttt.model import build_chunk, global_parameters, make_transformer_config

    config = load_config(
        [ROOT / "yaml_recipes/debug_cpu.yaml"],
        ["model.pattern=attention", "model.vocab_size=96", "model.num_layers=3"],
    )
    model = config.model
    ours = build_chunk(config, make_transformer_config(config, cpu_platform, torch.float64), None)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            # Small enough that the float32 inside Llama (norms, angles) stays under 1e-6.
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            rms_norm_eps=model.norm_eps,
            tie_word_embeddings=True,
        )
    ).double()
    state = {}
    for name, parameter in global_parameters(ours):
        state |= to_llama(name, parameter.detach(), model.num_heads)
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected

    ids = torch.randint(0, model.vocab_size, (2, 50))
    losses = []
    for logits in (ours(ids, None, None), llama(ids).logits):
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        losses[-1].backward()
        losses.append(logits.detach())
    assert relative(losses[1], losses[3]) < 1e-6
    gradients = {name: p.grad for name, p in llama.named_parameters()}
    compared = 0
    for name, parameter in global_parameters(ours):
        for theirs, gradient in to_llama(name, parameter.grad, model.num_heads).items():
            assert relative(gradient, gradients[theirs]) < 1e-6, theirs
            compared += 1
    assert compared == len(gradients)
