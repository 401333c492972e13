"""LaCT in transformers: cached decoding, left padding, exports in the official form."""

import itertools
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from harness import Job, random_model, read_golden, relative, run, section

from megatron_ttt.hf.building import build_hf_model
from megatron_ttt.hf.cache_ttt import TTTCache
from megatron_ttt.hf.configuration import architecture_from_hf_config

# Rates are float32 numbers; on a CPU their last bit depends on how many are computed in a call, and
# Muon makes much of it.
TOLERANCE = {False: 1e-9, True: 1e-7}
OPTIONS = {"chunk_size": 8, "window": 6, "low_rank": 4, "fast_heads": 2}
MODELS = {
    "momentum": (["lact"], {"lact": OPTIONS}),
    "muon, pre-norm": (["lact"], {"lact": {**OPTIONS, "muon": True, "pre_norm": True}}),
    "hybrid": (["lact", "attention"], {"lact": {**OPTIONS, "momentum": False}}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """A float64 model off its initial values."""
    pattern, mixers = MODELS[request.param]
    config, parameters = random_model(pattern, mixers, num_layers=2, hidden_size=32)
    model = build_hf_model(architecture_from_hf_config(config)).eval()
    model.load_state_dict(parameters, strict=False)
    model.tie_weights()
    model.tolerance = TOLERANCE["muon" in request.param]
    return model.double()


def random_ids(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(3, 96, (rows, columns), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(model):
    """Prompts of 1 to 36 tokens; then one token, then all others at once; and token by token."""
    ids = random_ids(2, 44)
    full = model(ids, use_cache=False).logits
    for first in range(1, 37):
        cache, start = TTTCache(model.config), 0
        for stop in (first, first + 1, 44):
            part = model(ids[:, start:stop], past_key_values=cache).logits
            assert relative(part, full[:, start:stop]) < model.tolerance, (first, stop)
            start = stop
    cache = TTTCache(model.config)
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(44)]
    assert relative(torch.cat(steps, 1), full) < model.tolerance


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model):
    """Prompts of 1 to 30 tokens in one batch, read in one call and in four."""
    N = 30
    ids, lengths = random_ids(N, N), range(1, N + 1)
    batch = torch.stack([F.pad(ids[n - 1, :n], (N - n, 0), value=3) for n in lengths])
    held = torch.arange(N) >= N - torch.arange(1, N + 1)[:, None]
    alone = [model(ids[n - 1 : n, :n], use_cache=False).logits[0] for n in lengths]
    for cuts in ((0, N), (0, 11, 12, 23, N)):
        cache = TTTCache(model.config)
        parts = [
            model(batch[:, a:b], attention_mask=held[:, :b].long(), past_key_values=cache).logits
            for a, b in itertools.pairwise(cuts)
        ]
        logits = torch.cat(parts, 1)
        for n, expected in zip(lengths, alone):
            assert relative(logits[n - 1][held[n - 1]], expected) < model.tolerance, (n, cuts)
        following = model(batch[:, :1], past_key_values=cache).logits
        for n in (1, 7, 8, 9, N):
            sequence = torch.cat([ids[n - 1, :n], batch[n - 1, :1]])[None]
            expected = model(sequence, use_cache=False).logits[0, -1:]
            assert relative(following[n - 1], expected) < model.tolerance, n


@torch.no_grad()
def test_greedy_and_beams_with_and_without_the_cache(model):
    ids = random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for beams in (1, 3):
        options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
        cached, slow = (
            model.generate(
                *(ids,),
                attention_mask=mask,
                use_cache=use_cache,
                num_beams=beams,
                pad_token_id=0,
                **options,
            )
            for use_cache in (True, False)
        )
        assert torch.equal(cached, slow)


def test_exports_in_the_official_form(tmp_path):
    config, golden = read_golden("lact_momentum_low_rank")
    job = Job(tmp_path)
    checkpoint = job.import_official("imported", config, section(golden, "param"))
    convert = [sys.executable, "tools/convert_checkpoint.py"]
    run([*convert, "export", "--checkpoint", checkpoint, "--output", tmp_path / "hf"])
    names = ("imported.hf", "hf")
    weights = [(tmp_path / name / "model.safetensors") for name in names]
    exported = json.loads((tmp_path / "hf/config.json").read_text())
    same = ("model_type", "num_attn_heads", "num_lact_heads", "lact_chunk_size", "w0_w2_low_rank")
    same += ("window_size", "norm_eps", "hidden_act", "use_momentum", "ttt_prenorm", "ttt_nope")
    assert {key: exported[key] for key in same} == {key: config[key] for key in same}
    assert "mixers" not in exported and "num_attention_heads" not in exported
    run([*convert, "import", "--hf", tmp_path / "hf", "--output", tmp_path / "again"])
    run([*convert, "export", "--checkpoint", tmp_path / "again", "--output", tmp_path / "hf2"])
    again = tmp_path / "hf2/model.safetensors"
    assert weights[1].read_bytes() == again.read_bytes()
    assert (tmp_path / "hf2/config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    original, ours = (load_file(path) for path in weights)
    assert original.keys() == ours.keys()
    assert all(torch.equal(original[name], ours[name]) for name in ours)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, dtype=torch.float64
    ).eval()
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    assert relative(logits, golden["logits"]) < 1e-7  # float64 weights, fp32 modules
