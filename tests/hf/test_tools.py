"""tools/generate.py and tools/evaluate.py on a checkpoint and on its export; tokenizer files."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from data.data_helpers import byte_level_tokenizer
from harness import ROOT, Job, random_official, run, torchrun, write_official

from megatron_ttt.checkpoint.manifest import describe, folder_files, write_manifest
from megatron_ttt.data.fingerprint import fingerprints
from megatron_ttt.data.indexed import IndexedWriter
from megatron_ttt.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from megatron_ttt.errors import UserError
from megatron_ttt.evaluation import official_config
from megatron_ttt.hf.exporter import export_checkpoint
from megatron_ttt.hf.importer import import_directory
from megatron_ttt.hf.tokenizer_files import write_tokenizer

TEXT = "the inner model learns at test time, while café 北京 reads 2026 \n\t its weights [x] "
TEXTS = [
    "The function returns   three  spaces.",
    "  début — naïve\n\n\tcafé 北京 🙂\u200b",
    "1234 5.6e-7 <s> </s> <unk>",
    "",
]


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A BPE model as the trainer's tokenizer makes it, and a unigram one, 300 pieces of bytes; and
    a tokenizer.json, which adds another token than training does."""
    folder = tmp_path_factory.mktemp("spm")
    made = {
        kind: train(folder / kind, kind, split_digits=True, **AS_IT_IS)
        for kind in ("bpe", "unigram")
    }
    tokenizer = byte_level_tokenizer([TEXT] * 50, 300)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made["json"] = folder / "tokenizer.json"
    tokenizer.save(str(made["json"]))
    return made


AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def train(prefix: Path, kind: str, vocab_size: int = 330, **options) -> Path:
    """A SentencePiece model of TEXT: PREFIX.model."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 50),
        model_prefix=str(prefix),
        model_type=kind,
        vocab_size=vocab_size,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def models(spm, tmp_path_factory):
    """A random model as a checkpoint and as its export, with a tokenizer and a dataset."""
    folder = tmp_path_factory.mktemp("models")
    config, parameters = random_official("linear", "mamba", layers=2, vocab=340)
    import_directory(write_official(folder / "official", config, parameters), folder / "checkpoint")
    export_checkpoint(folder / "checkpoint", folder / "hf", tokenizer_model=spm["bpe"])
    writer = IndexedWriter(folder / "data", np.dtype("<i4"))
    ids = np.random.default_rng(0).integers(1, 340, 8 * 48 + 1).astype("<i4")
    writer.append(ids.tobytes(), np.array([len(ids)], np.int32))
    writer.publish()
    np.save(folder / "ids.npy", ids[: 2 * 20].reshape(2, 20))
    return folder


@pytest.mark.parametrize("kind", ["bpe", "unigram", "json"])
def test_autotokenizer_gives_the_ids_of_training(kind, spm, models, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "hf"
    export_checkpoint(models / "checkpoint", folder, tokenizer_model=spm[kind])
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(spm[kind])
    for text in TEXTS[:2]:
        ids = theirs(text)["input_ids"]
        assert ids == [ours.bos_id, *ours.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    read_back = load_tokenizer(official_config(folder, []).data.tokenizer_model)
    assert read_back.encode(TEXT) == ours.encode(TEXT) and read_back.bos_id == ours.bos_id
    batch = theirs(["a longer text", "a"], padding=True)
    assert batch["attention_mask"][1][0] == 0  # on the left, as generation needs it


def test_a_tokenizer_that_does_not_fit_is_refused(models, tmp_path):
    large = train(tmp_path / "large", "bpe", vocab_size=360)
    size = SentencePieceTokenizer(large).vocab_size
    assert size > 340
    with pytest.raises(UserError, match=f"{size} pieces"):
        export_checkpoint(models / "checkpoint", tmp_path / "hf", tokenizer_model=large)
    assert not (tmp_path / "hf").exists()


def trained_with(tokenizer: Path, source: Path, folder: Path) -> Path:
    """The checkpoint as a run with this tokenizer would have left it."""
    shutil.copytree(source, folder)
    state = json.loads((folder / "state.json").read_text())
    del state["official"]
    state["config"]["data"] = {"tokenizer_model": str(tokenizer)}
    state["data"] = fingerprints([tokenizer])
    (folder / "state.json").write_text(json.dumps(state))
    write_manifest(folder, {name: describe(folder / name) for name in folder_files(folder)})
    return folder


def test_the_tokenizer_is_the_one_trained_with(spm, models, tmp_path, capsys):
    model = tmp_path / "tokenizer.model"
    shutil.copyfile(spm["bpe"], model)
    checkpoint = trained_with(model, models / "checkpoint", tmp_path / "checkpoint")
    export_checkpoint(checkpoint, tmp_path / "default")
    assert (tmp_path / "default/tokenizer.model").read_bytes() == model.read_bytes()
    shutil.copyfile(spm["unigram"], model)
    with pytest.raises(
        UserError, match=rf"{model} is no longer the tokenizer .* --tokenizer-model"
    ):
        export_checkpoint(checkpoint, tmp_path / "changed")
    export_checkpoint(checkpoint, tmp_path / "same", tokenizer_model=spm["bpe"])
    assert capsys.readouterr().err == ""
    export_checkpoint(checkpoint, tmp_path / "other", tokenizer_model=model)
    assert capsys.readouterr().err.startswith(f"Warning: {model} is not the tokenizer that")
    model.unlink()
    export_checkpoint(checkpoint, tmp_path / "gone")
    assert "has no tokenizer, give it with --tokenizer-model" in capsys.readouterr().err
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "gone" / file).read_text())["eos_token_id"] is None


def generate(*arguments) -> str:
    return run([sys.executable, "tools/generate.py", *arguments])


def test_greedy_ids_are_the_same_from_either_side_and_under_torchrun(models, tmp_path):
    options = ["--prompt-ids", models / "ids.npy", "--max-new-tokens", "21", "--greedy"]
    options += ["--dtype", "float64", "run.device=cpu"]
    generate("--checkpoint", models / "checkpoint", *options, "--save-ids", tmp_path / "a.npy")
    generate("--hf", models / "hf", *options, "--save-ids", tmp_path / "b.npy")
    tp2 = "parallel.tensor_model_parallel_size=2"
    source = ["--checkpoint", models / "checkpoint"]
    torchrun(
        2, ROOT / "tools/generate.py", *source, *options, "--save-ids", tmp_path / "c.npy", tp2
    )
    ids = np.load(tmp_path / "a.npy")
    assert ids.shape == (2, 41)
    for other in ("b", "c"):
        assert np.array_equal(ids, np.load(tmp_path / f"{other}.npy"))
    # The megatron model's own greedy choice at every position.
    job = Job(tmp_path)
    job.evaluate("greedy", "one", models / "checkpoint", torch.from_numpy(ids), "float64")
    best = job.tensors("greedy")["logits"].argmax(-1)[:, 19:-1]
    assert np.array_equal(best.numpy(), ids[:, 20:])


def test_generation_of_text(models, spm, tmp_path):
    options = ["--max-new-tokens", "8", "--json", tmp_path / "out.json", "run.device=cpu"]
    sampling = ["--temperature", "0.7", "--top-k", "20", "--top-p", "0.9", "--seed", "3"]
    (tmp_path / "prompt").write_text("the inner model\n")
    hf = ["--hf", models / "hf"]
    output = generate(*hf, "--prompt-file", tmp_path / "prompt", *sampling, *options)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["text"].startswith("the inner model") and result["text"] in output
    assert result["new_tokens"] == 8 and result["tokens_per_second"] > 0
    tokenizer = f"data.tokenizer_model={spm['bpe']}"
    source = ["--checkpoint", models / "checkpoint", "--prompt", "the inner model", tokenizer]
    generate(*source, *sampling, *options)
    assert json.loads((tmp_path / "out.json").read_text())["ids"] == result["ids"]


def test_evaluation_is_the_same_from_either_side(models, spm, tmp_path):
    options = [f"data.validation={models / 'data'}", "training.seq_length=48", "run.device=cpu"]
    options += [f"data.tokenizer_model={spm['bpe']}", "--dtype", "float64"]
    options += ["training.eval_batches=8", "training.global_batch_size=1"]
    options += [f"data.cache_dir={tmp_path}/cache"]
    results = {}
    for name, source in (
        ("checkpoint", ["--checkpoint", models / "checkpoint"]),
        ("hf", ["--hf", models / "hf"]),
    ):
        files = ["--json", tmp_path / f"{name}.json", "--plot", tmp_path / f"{name}.png"]
        run([sys.executable, "tools/evaluate.py", *source, *options, *files])
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    ours, theirs = results["checkpoint"], results["hf"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["perplexity"] == pytest.approx(math.exp(ours["loss"]))
    assert ours["loss_by_position"] == pytest.approx(theirs["loss_by_position"], rel=1e-6)
    assert len(ours["loss_by_position"]) == 48 and ours["sequences"] == 8
    layout = [*options, "parallel.pipeline_model_parallel_size=2", "--json", tmp_path / "pp2.json"]
    source = ["--checkpoint", models / "checkpoint"]
    torchrun(2, ROOT / "tools/evaluate.py", *source, *layout)
    pp2 = json.loads((tmp_path / "pp2.json").read_text())
    assert pp2["loss_by_position"] == pytest.approx(ours["loss_by_position"], rel=1e-6)
    assert pp2["loss"] == pytest.approx(ours["loss"], rel=1e-6)
    command = [sys.executable, "tools/evaluate.py", *source, *options]
    output = run([*command, "--json", tmp_path / "no/x.json"], expect=2)
    assert "no is no folder" in output
    layout = ["parallel.pipeline_model_parallel_size=2"]
    layout += ["parallel.virtual_pipeline_model_parallel_size=2"]
    assert "speeds up training alone: leave it out" in run([*command, *layout], expect=2)
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    layout += ["--input-ids", tmp_path / "ids.npy", "--save-logits", tmp_path / "logits.npy"]
    for length, why in (
        (37, "do not divide over 2 ranks"),
        (4, "leave 2 a rank, fewer than the 3"),
    ):
        np.save(tmp_path / "ids.npy", np.ones((1, length), np.int64))
        with pytest.raises(
            AssertionError, match=rf"{why}.*set\s+parallel\.sequence_parallel=false"
        ):
            torchrun(2, ROOT / "tools/evaluate.py", *source, "run.device=cpu", *layout)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_of_a_model_s_own_are_reproduced_or_refused(kind, prefix, tmp_path):
    """`tokenizers` cuts a text at them first, and would put a space before what comes behind."""
    own = {"add_dummy_prefix": prefix, "user_defined_symbols": ["<sep>"]}
    model = train(tmp_path / "own", kind, **own, **AS_IT_IS)
    if prefix:
        with pytest.raises(UserError, match=r"cannot be written for AutoTokenizer: .*<sep>"):
            write_tokenizer(model, tmp_path, 48)
        return
    write_tokenizer(model, tmp_path, 48)
    ours = SentencePieceTokenizer(model)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (TEXT, "a <sep>b<sep> c", "<sep>"):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_text_never_becomes_a_control_piece_or_a_byte(kind, tmp_path):
    """Whether the tokenizer has pieces for its characters or not: TEXT holds no < and >."""
    from transformers import AutoTokenizer

    symbols = ["<sep>", "inner", "the_"]
    model = train(tmp_path / "own", kind, control_symbols=symbols, **AS_IT_IS)
    write_tokenizer(model, tmp_path, 48)
    ours, theirs = SentencePieceTokenizer(model), AutoTokenizer.from_pretrained(tmp_path)
    names = {theirs.convert_tokens_to_ids(name) for name in (*symbols, "<0x41>")}
    for text in ("<sep>", "the_inner<sep> model", "x <0x41>y", "<0x4"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text) and not names & set(ids), text


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["--hf", "{0}/nowhere", "--prompt", "x"], "nowhere/config.json"),
        (["--checkpoint", "{0}/checkpoint", "--prompt", "x"], "data.tokenizer_model"),
        (["--checkpoint", "{0}/hf", "--prompt", "x"], "state.json"),
        (["--hf", "{0}/hf", "--prompt", "x", "--top-p", "0"], "--top-p"),
        (["--hf", "{0}/hf", "--prompt", "x", "--json", "{0}/no/x.json"], "no is no folder"),
        (["--hf", "{0}/hf", "--prompt", "x", "--save-ids", "{0}/hf"], "hf cannot be written"),
    ],
)
def test_bad_input_to_generate_is_one_line(arguments, named, models):
    arguments = [argument.format(models) for argument in arguments]
    output = run([sys.executable, "tools/generate.py", *arguments], expect=2)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and named in lines[0] and "Traceback" not in output, output
