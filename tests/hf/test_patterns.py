"""Hybrids, windows, grouped heads, untied heads: to a directory and back, the same model."""

import itertools
import json

import numpy as np
import pytest
import torch
from harness import Job, further, random_model, relative, write_official
from safetensors.torch import load_file

from megatron_ttt.hf import code
from megatron_ttt.hf.exporter import export_checkpoint
from megatron_ttt.hf.importer import import_directory
from megatron_ttt.hf.loading import load_directory

MODELS = {
    "3to1": (
        ["ttt_linear", "ttt_linear", "ttt_linear", "attention"],
        {"attention": {"window": 8, "num_kv_heads": 2}},
        {"tie_word_embeddings": False},
    ),
    "1to1": (["ttt_mlp", "attention"], {"ttt_mlp": {"base_lr": 0.1, "use_gate": False}}, {}),
    "windowed": (["attention"], {"attention": {"window": 5}}, {"num_layers": 2}),
    "grouped_llama": (
        ["attention"],
        {"attention": {"num_kv_heads": 2}},
        {"num_layers": 2, "tie_word_embeddings": False},
    ),
}
FILES = {
    "3to1": {"mixer_ttt.py", "inner_loop_ttt.py", "mixer_attention.py"},
    "1to1": {"mixer_ttt.py", "inner_loop_ttt.py", "mixer_attention.py"},
    "windowed": {"mixer_attention.py"},
    "grouped_llama": set(),
}


COMMON = set(code.COMMON)


@pytest.mark.parametrize("name", ["3to1", "grouped_llama", further("1to1"), further("windowed")])
def test_round_trip(tmp_path, name):
    pattern, mixers, model = MODELS[name]
    config, parameters = random_model(pattern, mixers, **model)
    assert ("lm_head.weight" in parameters) == (model.get("tie_word_embeddings") is False)
    job = Job(tmp_path)
    checkpoint = job.import_official("imported", config, parameters)
    export_checkpoint(checkpoint, tmp_path / "hf")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert {key: written[key] for key in config} == config
    assert (written["model_type"] == "llama") == (name == "grouped_llama")
    weights = load_file(tmp_path / "hf/model.safetensors")
    assert weights.keys() == parameters.keys()
    assert all(torch.equal(weights[key], parameters[key]) for key in parameters)
    assert {path.name for path in (tmp_path / "hf").glob("*.py")} - COMMON == FILES[name]
    import_directory(tmp_path / "hf", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "hf2")
    for file in ("model.safetensors", "config.json"):
        first, second = ((tmp_path / folder / file).read_bytes() for folder in ("hf", "hf2"))
        assert first == second, file

    # The layers' pattern crosses ranks: of tensors, and of pipeline stages.
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 96, (2, 37)))
    with torch.no_grad():
        theirs = load_directory(tmp_path / "hf", torch.float64)(ids, use_cache=False).logits
    for layout in ("tp2", "pp2"):
        job.evaluate(layout, layout, checkpoint, ids, "float64")
        assert relative(job.tensors(layout)["logits"], theirs) < 1e-6, layout


@torch.no_grad()
def test_a_llama_of_transformers_with_grouped_heads(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=96, **sizes, **heads, tie_word_embeddings=False)
    llama = LlamaForCausalLM(config).double().eval()
    llama.save_pretrained(tmp_path / "llama")
    import_directory(tmp_path / "llama", tmp_path / "checkpoint")
    ids = torch.randint(0, 96, (2, 37))
    job = Job(tmp_path)
    job.evaluate("logits", "tp2", tmp_path / "checkpoint", ids, "float64")
    assert relative(job.tensors("logits")["logits"], llama(ids).logits) < 1e-6
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    assert relative(exported(ids).logits, llama(ids).logits) < 1e-6
    for name, tensor in llama.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name


def test_bad_patterns(tmp_path):
    from megatron_ttt.errors import UserError

    config, parameters = random_model(["ttt_linear", "attention"], num_layers=2)
    numbers = itertools.count()

    def refused(match: str, **changes) -> None:
        folder = tmp_path / f"hf-{next(numbers)}"
        write_official(folder, {**config, **changes}, parameters)
        with pytest.raises(UserError, match=match) as refusal:
            import_directory(folder, tmp_path / "checkpoint")
        assert "\n" not in str(refusal.value) and not (tmp_path / "checkpoint").exists()

    mixers = config["mixers"]
    refused("layer_types", layer_types="ttt_linear")
    refused("do not fit each other", layer_types=["ttt_linear", "ttt_mlp"])
    refused("long", num_hidden_layers=4)
    refused("layer_types", layer_types=[["ttt_linear"], "attention"])
    refused("do not fit", layer_types=[], mixers={})
    refused("mixer_modules", mixer_modules="evil")
    refused("rope_parameters", rope_parameters=[1])
    refused("is none of", layer_types=["x", "y"], mixers={"x": {}, "y": {}})
    refused("other keys", mixers={**mixers, "attention": {"widow": 3}})
    refused("of another type", mixers={**mixers, "attention": {"window": "wide"}})
    refused("is too small", mixers={**mixers, "attention": {"window": 0}})


def test_a_file_beside_a_directory_is_not_run(tmp_path, monkeypatch):
    """Not even where Python would find it."""
    from megatron_ttt.config import config_from_tree
    from megatron_ttt.errors import UserError

    config, parameters = random_model(["ttt_linear", "attention"], num_layers=2)
    folder = write_official(tmp_path / "hf", {**config, "mixer_modules": ["hf.evil"]}, parameters)
    (folder / "evil.py").write_text("open('was_run', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import_directory(folder, tmp_path / "checkpoint")
    tree = json.loads((tmp_path / "checkpoint/state.json").read_text())["config"]
    assert tree["model"]["mixer_modules"] == ["hf.evil"]
    tree["model"]["pattern"] = ["evil"]
    with pytest.raises(UserError, match=r"evil is none of .* in MEGATRON_TTT_MIXERS"):
        config_from_tree(tree, "a checkpoint")
    assert not (tmp_path / "was_run").exists()
