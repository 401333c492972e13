"""What tools/generate.py draws, and with which tokenizer."""

import json
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
from harness import ROOT, random_official, write_official

sys.path.insert(0, str(ROOT / "tools"))
import generate

from megatron_ttt.data.fingerprint import fingerprints
from megatron_ttt.data.tokenizer_training import train_tokenizer
from megatron_ttt.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tokenizer.model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = {"text": (ROOT / "LICENSE").read_text()}
    (folder / "text.json").write_text(json.dumps(text))
    return train_tokenizer([str(folder / "text.json")], str(folder / "tokenizer"), 350)


def configuration(tokenizer_model, vocab_size: int) -> SimpleNamespace:
    return SimpleNamespace(
        data=SimpleNamespace(tokenizer_model=str(tokenizer_model)),
        model=SimpleNamespace(vocab_size=vocab_size),
        run=SimpleNamespace(device="cpu"),
    )


@pytest.mark.parametrize(
    "sampling",
    [
        {"greedy": True},
        {"greedy": False, "temperature": 2.0, "top_k": 0, "top_p": 1.0},
        {"greedy": False, "temperature": 1.0, "top_k": 50, "top_p": 0.9},
    ],
)
def test_only_what_the_tokenizer_knows_is_drawn(cpu_platform, model, tmp_path, sampling):
    folder = write_official(
        tmp_path / "hf", *random_official("linear", "mamba", layers=1, vocab=4000)
    )
    arguments = Namespace(hf=folder, dtype=None, seed=0, max_new_tokens=12, save_ids=None)
    vars(arguments).update(sampling, json=tmp_path / "out.json")
    config = configuration(model, 4000)
    tokenizer = generate.open_tokenizer(config, None)
    generate.Writer(arguments, config).go_on(
        generate.prompt_ids(tokenizer, "the license"), tokenizer
    )
    (ids,) = json.loads((tmp_path / "out.json").read_text())["ids"]
    assert max(ids) < tokenizer.vocab_size < 4000


def test_another_tokenizer_at_the_recorded_path_is_refused(model, tmp_path, capsys):
    state = {"step": 1, "has_optimizer": False, "data": fingerprints([model])}
    state["config"] = {"data": {"tokenizer_model": str(model)}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    config = configuration(model, 350)
    generate.open_tokenizer(config, tmp_path)
    state["data"][str(model)]["sha256"] = "another"
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"tokenizer\.model is no longer .* with data\."):
        generate.open_tokenizer(config, tmp_path)
    assert capsys.readouterr().err == ""
    other = tmp_path / "other.model"
    other.write_bytes(model.read_bytes())
    generate.open_tokenizer(configuration(other, 350), tmp_path)  # named, it is taken
    assert "other.model is not the tokenizer that" in capsys.readouterr().err
