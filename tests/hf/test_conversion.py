"""Checkpoints to Hugging Face directories and back, from any layout; JAX files; refusals."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from harness import (
    GOLDEN,
    Job,
    model_sections,
    random_official,
    read_golden,
    relative,
    section,
    write_official,
)
from safetensors.torch import load_file, save_file

from megatron_ttt.errors import UserError
from megatron_ttt.hf import exporter
from megatron_ttt.hf.code import load_code
from megatron_ttt.hf.exporter import export_checkpoint
from megatron_ttt.hf.importer import import_directory, import_jax
from megatron_ttt.mixers import MIXERS

CODES = {name: mixer.hf_code for name, mixer in MIXERS.items()}

FLOAT64 = [
    "linear_transformer",
    "mlp_transformer",
    "linear_mamba",
    "mlp_mamba",
    "linear_mamba_ragged",
    "mlp_mamba_ragged",
]
JAX = ["jax_linear_mamba", "jax_mlp_mamba"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype
        and torch.equal(x.contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8))
        for name, x in a.items()
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A checkpoint of a golden file's parameters, made once."""
    folder = tmp_path_factory.mktemp("imported")

    def checkpoint(name: str) -> Path:
        if not (folder / name).exists():
            config, tensors = read_golden(name)
            parameters = section(tensors, "param")
            import_directory(
                write_official(folder / f"{name}.hf", config, parameters), folder / name
            )
        return folder / name

    return checkpoint


@pytest.mark.parametrize("name", FLOAT64 + JAX)
def test_round_trip_is_bit_identical_and_loads(name, imported, tmp_path):
    from transformers import AutoModelForCausalLM

    config, golden = read_golden(name)
    output = tmp_path / "hf"
    export_checkpoint(imported(name), output)
    assert same(weights(output), section(golden, "param"))
    written = json.loads((output / "config.json").read_text())
    assert {k: written[k] for k in config} == config
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True, dtype="auto")
    assert model.dtype == golden["logits"].dtype
    with torch.no_grad():
        error = relative(model(golden["input_ids"]).logits, golden["logits"])
    assert error < (1e-5 if name in JAX else 1e-6)
    again = tmp_path / "again"
    import_directory(output, again)
    export_checkpoint(again, tmp_path / "hf2")
    assert same(weights(tmp_path / "hf2"), section(golden, "param"))
    # Only what a converted model cannot know of its training differs.
    for file in ("config.json", "modeling_ttt.py", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "hf2" / file).read_bytes() == (output / file).read_bytes(), file


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same weights in checkpoints of five layouts: one step at learning rate zero from them."""
    job = Job(tmp_path_factory.mktemp("layouts"))
    config, tensors = read_golden("jax_mlp_mamba")
    checkpoint = job.import_official("source", config, section(tensors, "param"))
    baseline = model_sections(config)
    for name, precision, layer in (("fp32", "fp32", "ttt_mlp"), ("llama", "bf16", "attention")):
        for layout in ("one", "tp2", "pp2", "tp2pp2"):
            folder = job.folder / f"{name}-{layout}"
            folder.mkdir()
            tokens = folder / "tokens.npy"
            import numpy as np

            np.save(tokens, np.random.default_rng(0).integers(0, 64, (1, 2, 33)))
            recipe = {
                "model": {**baseline["model"], "pattern": [layer]},
                "mixers": baseline["mixers"],
                "optimizer": {"lr": 0.0, "min_lr": 0.0},
                "training": {
                    "steps": 1,
                    "seq_length": 32,
                    "global_batch_size": 2,
                    "precision": precision,
                },
                "data": {"fixed_batches": str(tokens)},
            }
            if layer == "ttt_mlp":
                recipe["checkpoint"] = {"load": str(checkpoint)}
            job.train(f"{name}-{layout}", layout, recipe)
    return job


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2pp2"])
def test_every_layout_exports_the_same_bytes(layout, layouts, tmp_path):
    _, tensors = read_golden("jax_mlp_mamba")
    checkpoint = layouts.run(f"fp32-{layout}") / "checkpoint-1"
    export_checkpoint(checkpoint, tmp_path / "hf")
    assert same(weights(tmp_path / "hf"), section(tensors, "param"))
    import_directory(tmp_path / "hf", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "hf2")
    assert (tmp_path / "hf2/model.safetensors").read_bytes() == (
        tmp_path / "hf/model.safetensors"
    ).read_bytes()
    card = (tmp_path / "hf/README.md").read_text()
    assert "steps: 1 of 1, 64 tokens" in card and "training loss at the last step: 5." in card


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "tp2pp2"])
def test_the_transformer_baseline_is_a_llama(layout, layouts, tmp_path):
    """bf16, every layout the same bytes; import gives them back."""
    export_checkpoint(layouts.run(f"llama-{layout}") / "checkpoint-1", tmp_path / "hf")
    export_checkpoint(layouts.run("llama-one") / "checkpoint-1", tmp_path / "one")
    exported = weights(tmp_path / "hf")
    assert same(exported, weights(tmp_path / "one"))
    if layout != "tp2pp2":
        return
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "LlamaForCausalLM"
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
    assert model.generation_config.eos_token_id is None  # no tokenizer says which it is
    import_directory(tmp_path / "hf", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "hf2")
    assert same(weights(tmp_path / "hf2"), exported)


@pytest.mark.parametrize("name", JAX)
@pytest.mark.parametrize("kind", ["streaming_params", "streaming_train_state"])
def test_jax_checkpoints(name, kind, tmp_path):
    config, tensors = read_golden(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    import_jax(GOLDEN / f"{name}.{kind}", tmp_path / "config.json", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    assert same(weights(tmp_path / "hf"), section(tensors, "param"))


def test_mixed_dtypes_bin_files_heads_and_shards(tmp_path):
    """bf16 with a float32 inner model, from pytorch_model.bin with a head, to several files."""
    config, parameters = random_official("mlp", "transformer", layers=2)
    inner = ("W1", "b1", "W2", "b2", "ttt_norm", "learnable")
    parameters = {
        name: tensor if any(part in name for part in inner) else tensor.bfloat16()
        for name, tensor in parameters.items()
    }
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    head = {"lm_head.weight": parameters["model.embed_tokens.weight"]}
    torch.save({**parameters, **head}, folder / "pytorch_model.bin")
    import_directory(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf", shard_bytes=50_000)
    assert len(list((tmp_path / "hf").glob("model-0*.safetensors"))) > 3
    assert same(weights(tmp_path / "hf"), parameters)
    old = {"_use_new_zipfile_serialization": False}
    torch.save({**parameters, **head}, folder / "pytorch_model.bin", **old)
    import_directory(folder, tmp_path / "from the old format")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, dtype="auto"
    )
    loaded = dict(model.named_parameters())
    assert same({name: loaded[name].data for name in parameters}, parameters)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "wide", dtype="float32")
    assert {tensor.dtype for tensor in weights(tmp_path / "wide").values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["ttt", "llama"])
def test_several_ends_of_text(kind, layouts, tmp_path, monkeypatch):
    """One of them pads. Nothing is published that transformers could not load."""
    from transformers import GenerationConfig

    source = tmp_path / "source"
    if kind == "ttt":
        write_official(source, *random_official("linear", "transformer", layers=1))
    else:
        export_checkpoint(layouts.run("llama-one") / "checkpoint-1", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 3]}))
    import_directory(source, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    loaded = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (loaded.eos_token_id, loaded.pad_token_id) == ([2, 3], 2)
    # Transformers would not train the row of a pad id.
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert written["pad_token_id"] == (2 if kind == "ttt" else None)

    write_json = exporter._write_json
    bad = {"pad_token_id": [2, 3]}
    monkeypatch.setattr(exporter, "_write_json", lambda path, tree: write_json(path, tree | bad))
    with pytest.raises(UserError, match=r"cannot load the export's .*Config: .*; nothing was"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_verification_names_the_first_module_and_publishes_nothing(imported, tmp_path, monkeypatch):
    output = tmp_path / "hf"
    split = exporter.split

    def swapped(row, tensor):
        pairs = list(split(row, tensor))
        if row.name == "decoder.layers.1.mlp.linear_fc1.weight":
            pairs = [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])]
        return pairs

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "split", swapped)
        with pytest.raises(
            UserError, match=r"first module .* is model\.layers\.1\.mlp\.gate_proj;"
        ):
            export_checkpoint(imported("mlp_mamba"), output)
    mixer_ttt = sys.modules[load_code(CODES).MIXERS["ttt_mlp"].__module__]
    with monkeypatch.context() as patch:
        patch.setattr(mixer_ttt, "rotate_pairs", lambda x, cos, sin: x)
        with pytest.raises(UserError, match=r"is model\.layers\.0\.seq_modeling_block\.post_norm;"):
            export_checkpoint(imported("mlp_mamba"), output)
        with pytest.raises(UserError, match=r"seq_modeling_block\.post_norm"):
            import_directory(imported("mlp_mamba").parent / "mlp_mamba.hf", tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def refused(match: str, function, *arguments, **options) -> None:
    """One line, and nothing but what was there."""
    folder = arguments[-1].parent
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=match) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before


def test_bad_imports(tmp_path):
    config, parameters = random_official("linear", "mamba", layers=1)
    output = tmp_path / "checkpoint"

    def source(changes=None, tensors=None) -> Path:
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        return write_official(
            tmp_path / "hf", {**config, **(changes or {})}, {**parameters, **(tensors or {})}
        )

    missing = source()
    q = "model.layers.0.seq_modeling_block.q_proj.weight"
    save_file({k: v for k, v in parameters.items() if k != q}, missing / "model.safetensors")
    refused(f"lack {q}", import_directory, missing, output)
    refused(
        r"q_proj\.weight is \(64, 32\), not \(64, 64\)",
        import_directory,
        source(tensors={q: torch.zeros(64, 32)}),
        output,
    )
    for key, value in (
        ("ttt_layer_type", "gru"),
        ("hidden_act", "gelu"),
        ("use_gate", "false"),
        ("mini_batch_size", 0),
        ("tie_word_embeddings", "yes"),
        ("num_attention_heads", "four"),
        ("model_type", "mamba"),
    ):
        refused(key, import_directory, source({key: value}), output)
    refused("no place for", import_directory, source(tensors={"extra": torch.zeros(1)}), output)
    refused(
        "config.json ties them",
        import_directory,
        source(tensors={"lm_head.weight": torch.zeros(96, 64)}),
        output,
    )
    cut = source()
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("damaged", import_directory, cut, output)
    index = cut / "model.safetensors.index.json"
    (cut / "model.safetensors").write_bytes(whole)
    for content in ("{", "{}", "[]"):
        index.write_text(content)
        refused(r"index\.json is damaged", import_directory, cut, output)
    index.unlink()
    (cut / "model.safetensors").unlink()
    linear = torch.nn.Linear(1, 1)
    for content, why in (([parameters], "is damaged"), (linear, r"asks for torch\.nn\.modules")):
        torch.save(content, cut / "pytorch_model.bin")
        refused(rf"pytorch_model\.bin {why}", import_directory, cut, output)
    (cut / "config.json").write_text("{")
    refused("cannot read .*config.json", import_directory, cut, output)
    good = source()
    output.mkdir()
    refused("exists", import_directory, good, output)


def test_bad_jax_files(tmp_path):
    config, _ = read_golden("jax_linear_mamba")
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (GOLDEN / "jax_linear_mamba.streaming_params").read_bytes()
    file = tmp_path / "stream"
    for content, match in (
        (whole[: len(whole) // 2], "cut short"),
        (b"text, not tensors", "no streaming checkpoint"),
        (b"", "no parameters"),
    ):
        file.write_bytes(content)
        refused(match, import_jax, file, tmp_path / "config.json", tmp_path / "checkpoint")
    mlp = GOLDEN / "jax_mlp_mamba.streaming_params"
    refused("not", import_jax, mlp, tmp_path / "config.json", tmp_path / "checkpoint")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_bad_exports(imported, tmp_path):
    whole, output = imported("linear_mamba"), tmp_path / "hf"
    broken = tmp_path / "broken"
    for damage, match in (
        (lambda: (broken / "state.json").unlink(), "no checkpoint"),
        (lambda: (broken / ".metadata").unlink(), "is damaged"),
        (lambda: flip_a_bit(next(broken.glob("*.distcp"))), "has another checksum"),
        (lambda: [f.write_bytes(f.read_bytes()[:999]) for f in broken.glob("*.distcp")], "damaged"),
        (lambda: [f.unlink() for f in broken.glob("*.distcp")], "damaged"),
    ):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        damage()
        refused(match, export_checkpoint, broken, output)
    refused(
        r"is not a tokenizer\.json",
        export_checkpoint,
        whole,
        output,
        tokenizer_model=whole / "state.json",
    )
    output.mkdir()
    refused("exists", export_checkpoint, whole, output)
