"""Models in transformers that mix mixers: their cache, generate(), the folder they are loaded from.

`test_transformers_versions.py` runs this file with transformers 4.57 too.
"""

import itertools
import json
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import relative

from megatron_ttt.hf.cache_ttt import TTTCache
from megatron_ttt.hf.code import load_code, write_code
from megatron_ttt.hf.configuration_ttt import TTTConfig
from megatron_ttt.hf.modeling_ttt import TTTForCausalLM
from megatron_ttt.mixers import MIXERS
from megatron_ttt.mixers.hf_code import HFCode

CODES = {name: mixer.hf_code for name, mixer in MIXERS.items()}

load_code(CODES)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TTT = {
    "use_gate": True,
    "share_qk": True,
    "pre_conv": True,
    "mini_batch_size": 4,
    "base_lr": 0.5,
    "conv_kernel": 4,
    "rope_theta": 10000.0,
}
ATTENTION = {"window": None, "num_kv_heads": None, "rope_theta": 500.0}
WINDOW = 8
HYBRIDS = {
    "3:1": (
        ["ttt_linear", "ttt_linear", "ttt_linear", "attention"],
        {"ttt_linear": TTT, "attention": {**ATTENTION, "window": WINDOW, "num_kv_heads": 2}},
    ),
    "1:1": (
        ["ttt_mlp", "attention", "ttt_mlp", "attention"],
        {"ttt_mlp": {**TTT, "pre_conv": False, "conv_kernel": 3}, "attention": ATTENTION},
    ),
}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CODE = {"configuration_ttt.py", "cache_ttt.py", "layers_ttt.py", "modeling_ttt.py"}


def build(layer_types=None, mixers=None, **more) -> TTTForCausalLM:
    """A float64 model, every parameter of it off its trivial initial value."""
    torch.manual_seed(0)
    config = TTTConfig(**{**SIZES, **more}, layer_types=layer_types, mixers=mixers)
    model = TTTForCausalLM(config).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request) -> TTTForCausalLM:
    return build(*HYBRIDS[request.param])


def random_ids(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(3, 61, (rows, columns), generator=torch.Generator().manual_seed(1))


def uncached(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of whole sequences."""
    return model(ids, use_cache=False).logits


@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(hybrid):
    """Prompts of 1 to 40 tokens; then one token, then all others at once; and token by token."""
    ids = random_ids(2, 52)
    full = uncached(hybrid, ids)
    for first in range(1, 41):
        cache, start = TTTCache(hybrid.config), 0
        for stop in (first, first + 1, 52):
            part = hybrid(ids[:, start:stop], past_key_values=cache).logits
            assert relative(part, full[:, start:stop]) < 1e-9, (first, stop)
            start = stop
    cache = TTTCache(hybrid.config)
    steps = [hybrid(ids[:, i : i + 1], past_key_values=cache).logits for i in range(52)]
    assert relative(torch.cat(steps, 1), full) < 1e-9


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(hybrid):
    """Prompts of 1 to 40 tokens in one batch, read in one call and in four."""
    ids, lengths = random_ids(40, 40), range(1, 41)
    batch = torch.stack([F.pad(ids[n - 1, :n], (40 - n, 0), value=3) for n in lengths])
    held = torch.arange(40) >= 40 - torch.arange(1, 41)[:, None]
    alone = [uncached(hybrid, ids[n - 1 : n, :n])[0] for n in lengths]
    for cuts in ((0, 40), (0, 17, 18, 31, 40)):
        cache = TTTCache(hybrid.config)
        parts = [
            hybrid(batch[:, a:b], attention_mask=held[:, :b].long(), past_key_values=cache).logits
            for a, b in itertools.pairwise(cuts)
        ]
        logits = torch.cat(parts, 1)
        for n, expected in zip(lengths, alone):
            assert relative(logits[n - 1][held[n - 1]], expected) < 1e-9, (n, cuts)
        assert cache.position_B.tolist() == list(lengths)
        # Each row goes on from its own position.
        following = hybrid(batch[:, :1], past_key_values=cache).logits
        for n in (1, 7, 8, 9, 40):
            sequence = torch.cat([ids[n - 1, :n], batch[n - 1, :1]])[None]
            assert relative(following[n - 1], uncached(hybrid, sequence)[0, -1:]) < 1e-9, n


@torch.no_grad()
def test_greedy_and_beams_with_and_without_the_cache(hybrid):
    ids = random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for beams in (1, 3):
        options = {**GREEDY, "num_beams": beams}
        cached, slow = (
            hybrid.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, slow)
        alone = hybrid.generate(ids[:1, 6:], attention_mask=mask[:1, 6:], **options)
        assert torch.equal(cached[0, 6:], alone[0])


@torch.no_grad()
def test_attention_with_a_window_remembers_no_more_than_it():
    model = build(*HYBRIDS["3:1"])
    held = []
    for length in (3, 8, 9, 30, 60):
        cache = model(random_ids(2, length), use_cache=True).past_key_values
        keys = cache.layers[3]["keys"]
        assert keys.shape[2] == cache.layers[3]["values"].shape[2] == min(length, WINDOW - 1)
        assert keys.untyped_storage().nbytes() == keys.numel() * keys.element_size()
        held.append(cache.memory_bytes())
    assert held[0] < held[1] == held[2] == held[3] == held[4]
    for _ in range(3):
        model(random_ids(2, 1), past_key_values=cache)
    assert cache.memory_bytes() == held[-1]


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 5, None])
def test_attention_alone_is_a_mistral(window):
    """With a window, with groups of heads; by the names and the arithmetic of transformers."""
    options = {**ATTENTION, "window": window, "num_kv_heads": 2}
    model = build(["attention"] * 4, {"attention": options}, tie_word_embeddings=False)
    config = transformers.MistralConfig(
        **{**SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
        rope_theta=500.0,
        sliding_window=window,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    mistral = transformers.MistralForCausalLM(config).to(torch.float64).eval()
    mistral.load_state_dict(model.state_dict())
    ids = random_ids(2, 30)
    # Its norms are computed in float32.
    assert relative(uncached(model, ids), mistral(ids).logits) < 1e-6
    if window:
        other = {"attention": {**options, "window": window + 1}}
        wider = build(["attention"] * 4, other, tie_word_embeddings=False)
        assert relative(uncached(wider, ids), mistral(ids).logits) > 1e-3


@torch.no_grad()
def test_grouped_heads_are_repeated_ones():
    types = ["attention"] * 4
    grouped = build(types, {"attention": {**ATTENTION, "num_kv_heads": 2}})
    whole = build(types, {"attention": ATTENTION})
    state = grouped.state_dict()
    for name, tensor in state.items():
        if re.search(r"[kv]_proj", name):
            assert tensor.shape == (16, 32)
            state[name] = tensor.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(state)
    ids = random_ids(2, 20)
    assert relative(uncached(grouped, ids), uncached(whole, ids)) < 1e-12
    for model, heads in ((grouped, 2), (whole, 4)):
        cache = model(ids, use_cache=True).past_key_values
        assert cache.layers[0]["keys"].shape == (2, heads, 20, 8)


@torch.no_grad()
@pytest.mark.parametrize("switches", itertools.product([False, True], repeat=3), ids=str)
def test_every_combination_of_the_switches(switches):
    use_gate, share_qk, pre_conv = switches
    flags = {"use_gate": use_gate, "share_qk": share_qk, "pre_conv": pre_conv}
    flat = {**flags, "mini_batch_size": 4, "ttt_base_lr": 0.5, "ttt_layer_type": "mlp"}
    model = build(**flat, num_hidden_layers=2)
    names = {
        name.split(".", 3)[3].split(".weight")[0]
        for name, _ in model.named_parameters()
        if name.startswith("model.layers.1.") and name.endswith(".weight")
    }
    block = "seq_modeling_block."
    assert names == {
        *(block + name for name in ("q_proj", "v_proj", "o_proj", "post_norm")),
        *(block + name for name in ("conv_q", "conv_k") if share_qk),
        *([] if share_qk else [block + "k_proj"]),
        *([block + "g_proj"] if use_gate else []),
        *(["conv.norm", "conv.conv"] if pre_conv else []),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        "seq_norm",
        "ffn_norm",
    }  # fmt: skip
    ids = random_ids(2, 19)
    full, cache = uncached(model, ids), TTTCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([6, 1, 12], 1)]
    assert relative(torch.cat(parts, 1), full) < 1e-9
    # The same by layer_types and mixers.
    named = build(["ttt_mlp"] * 2, {"ttt_mlp": {**TTT, **flags}}, num_hidden_layers=2)
    assert torch.equal(uncached(named, ids), full)


def written(model: TTTForCausalLM, folder, mixers) -> None:
    """A directory as an export writes it."""
    model.config.auto_map = {
        "AutoConfig": "configuration_ttt.TTTConfig",
        "AutoModel": "modeling_ttt.TTTModel",
        "AutoModelForCausalLM": "modeling_ttt.TTTForCausalLM",
    }
    model.save_pretrained(folder)
    write_code(folder, mixers)


def loaded(folder) -> TTTForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64
    )


def code_of(folder) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_written_folder_is_loaded_and_saved_again(name, tied, tmp_path):
    types, mixers = HYBRIDS[name]
    model = build(types, mixers, tie_word_embeddings=tied)
    folder, again = tmp_path / f"hybrid{types[0]}{tied}", tmp_path / f"again{types[0]}{tied}"
    written(model, folder, {kind: CODES[kind] for kind in mixers})
    assert code_of(folder) == CODE | {"mixer_ttt.py", "inner_loop_ttt.py", "mixer_attention.py"}
    tree = json.loads((folder / "config.json").read_text())
    assert tree["layer_types"] == types and tree["mixers"] == mixers
    assert not tree.keys() & {"mixer_types", "ttt_layer_type", "mini_batch_size", "use_gate"}
    ids = random_ids(2, 13)
    expected = uncached(model, ids)
    loaded(folder).save_pretrained(again)
    assert code_of(again) == code_of(folder)
    for copy in (loaded(folder), loaded(again)):
        assert type(copy) is not type(model) and "transformers_modules" in type(copy).__module__
        assert relative(uncached(copy, ids), expected) < 1e-12
        assert torch.equal(copy.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
        assert (copy.lm_head.weight is copy.model.embed_tokens.weight) == tied
        assert copy.config.mixer_types == types
    half = TTTForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    block = half.model.layers[0].seq_modeling_block
    assert block.W1.dtype == torch.float32 and block.q_proj.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_folders_of_one_name_in_one_process(tmp_path):
    """Each has its own mixers; the second model is not made by the first one's code."""
    ids = random_ids(1, 13)
    for name, (types, mixers) in HYBRIDS.items():
        folder = tmp_path / name.replace(":", "_") / "final_model"
        model = build(types, mixers)
        written(model, folder, {kind: CODES[kind] for kind in mixers})
        assert relative(uncached(loaded(folder), ids), uncached(model, ids)) < 1e-12


def test_only_the_files_in_use_are_written(tmp_path):
    files = {"ttt_mlp": {"mixer_ttt.py", "inner_loop_ttt.py"}, "attention": {"mixer_attention.py"}}
    for kind, own in files.items():
        (tmp_path / kind).mkdir()
        write_code(tmp_path / kind, {kind: CODES[kind]})
        assert code_of(tmp_path / kind) == CODE | own
    twice = {"ttt_mlp": CODES["ttt_mlp"], "other": HFCode(tmp_path / "mixer_ttt.py", "Other")}
    with pytest.raises(ValueError, match="have one name in an export"):
        write_code(tmp_path, twice)


def test_one_mixer_in_all_layers_keeps_the_official_keys(tmp_path):
    model = build(use_gate=True, mini_batch_size=4)
    model.config.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    assert not tree.keys() & {"layer_types", "mixer_types", "mixers"}
    assert tree.keys() >= {
        "ttt_layer_type",
        "ttt_base_lr",
        "mini_batch_size",
        "use_gate",
        "share_qk",
        "pre_conv",
        "conv_kernel",
        "rope_theta",
        "scan_checkpoint_group_size",
    }
    assert TTTConfig.from_pretrained(tmp_path).mixer_types == ["ttt_linear"] * 4


MEAN = '''
import torch
from torch import nn

from .layers_ttt import Mixer


class Mean(Mixer):
    """The mean of the tokens so far, scaled."""

    module_name = "mean"
    norm_names = ("norm1", "norm2")

    def __init__(self, config, layer_idx):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.power = config.mixer_options(layer_idx).power

    @staticmethod
    def pre_conv_width(options):
        return 3

    def forward(self, x_BLD, span, entry):
        held = torch.arange(span.length) < span.lengths_B[:, None]
        sums = (x_BLD * held[..., None]).cumsum(1)
        if entry and "sum" in entry:
            sums = sums + entry["sum"][:, None]
        if entry is not None:
            entry["sum"] = sums[:, -1]
        count = (span.positions_BL() + 1)[..., None]
        return self.scale * sums / count**self.power

    def init_parameter(self, name, parameter, std):
        parameter.fill_(0.5)
'''


@torch.no_grad()
def test_a_mixer_from_outside_the_package(tmp_path):
    """Its file stands beside ours; padding, beams and a second call are what ours are."""
    (tmp_path / "mixer_mean.py").write_text(MEAN)
    mine = {"mean": HFCode(tmp_path / "mixer_mean.py", "Mean")}
    types = ["mean", "attention"]
    options = {"mean": {"power": 1.0}, "attention": {**ATTENTION, "window": 5}}
    with pytest.raises(ValueError, match="no code of the mixer mean is here, only of ttt_linear"):
        build(types, options, num_hidden_layers=2)
    load_code(mine)
    model = build(types, options, num_hidden_layers=2)
    fresh = TTTForCausalLM(model.config)
    assert (fresh.model.layers[0].mean.scale == 0.5).all()
    folder = tmp_path / "with_a_mean"
    written(model, folder, {**mine, "attention": CODES["attention"]})
    assert code_of(folder) == CODE | {"mixer_mean.py", "mixer_attention.py"}
    names = dict(model.named_parameters())
    assert {"model.layers.0.mean.scale", "model.layers.0.conv.conv.weight"} <= names.keys()
    copy, ids = loaded(folder), random_ids(2, 13)
    full = uncached(copy, ids)
    assert relative(full, uncached(model, ids)) < 1e-12
    cache = copy(ids[:, :6], use_cache=True).past_key_values
    assert relative(copy(ids[:, 6:], past_key_values=cache).logits, full[:, 6:]) < 1e-9
    beams = [
        copy.generate(ids, num_beams=3, use_cache=use_cache, **GREEDY)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


def test_a_wrong_configuration_is_refused():
    types, mixers = HYBRIDS["1:1"]
    for wrong, match in (
        ((types[:3], mixers), "layer_types has 3 names for 4 layers"),
        ((types, {"ttt_mlp": TTT}), "no options for attention"),
        ((types, None), "given together"),
        ((None, mixers), "given together"),
        ((types, {**mixers, "attention": {**ATTENTION, "num_kv_heads": 3}}), "num_kv_heads=3"),
    ):
        with pytest.raises(ValueError, match=match):
            build(*wrong)
