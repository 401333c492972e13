"""The shipped transformers model: official logits and gradients, its cache, generate(), training.

Needs torch, transformers and accelerate alone; `test_transformers_versions.py` runs this file with
transformers 4.57 too.
"""

import copy
import re
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import random_official, read_golden, relative, section
from transformers.cache_utils import Cache, DynamicCache

from megatron_ttt.hf.cache_ttt import TTTCache
from megatron_ttt.hf.code import load_code
from megatron_ttt.hf.configuration_ttt import TTTConfig
from megatron_ttt.hf.modeling_ttt import TTTForCausalLM
from megatron_ttt.mixers import MIXERS

CODES = {name: mixer.hf_code for name, mixer in MIXERS.items()}

mixer_ttt = sys.modules[load_code(CODES).MIXERS["ttt_linear"].__module__]

GOLDEN = [
    "linear_transformer",
    "mlp_transformer",
    "linear_mamba",
    "mlp_mamba",
    "linear_mamba_ragged",
    "mlp_mamba_ragged",
]
KINDS = GOLDEN[:4]


def build(config: dict, parameters: dict, dtype=torch.float64) -> TTTForCausalLM:
    model = TTTForCausalLM(TTTConfig(**config, bos_token_id=1, eos_token_id=None)).to(dtype).eval()
    missing, unexpected = model.load_state_dict(parameters, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    return model


def golden_model(name: str, dtype=torch.float64) -> tuple[TTTForCausalLM, torch.Tensor]:
    config, tensors = read_golden(name)
    return build(config, section(tensors, "param"), dtype), tensors["input_ids"]


@pytest.fixture(params=["package", "alone"])
def either_scan(request, monkeypatch):
    """With the package's scan, and as in an environment that has only the exported files."""
    if request.param == "alone":
        monkeypatch.setattr(mixer_ttt, "ttt_scan", None)


@pytest.mark.parametrize("name", GOLDEN)
def test_official_logits_and_gradients(name, either_scan):
    _, golden = read_golden(name)
    model, ids = golden_model(name)
    logits = model(ids, use_cache=False).logits
    assert relative(logits, golden["logits"]) < 1e-9
    assert relative(model(ids, use_cache=True).logits, golden["logits"]) < 1e-9
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() / golden["loss"].item() - 1) < 1e-9
    assert abs(model(ids, labels=ids).loss.item() / golden["loss"].item() - 1) < 1e-6
    loss.backward()
    gradients = section(golden, "grad")
    named = dict(model.named_parameters())
    assert set(named) == set(gradients)
    for parameter, gradient in gradients.items():
        assert relative(named[parameter].grad, gradient) < 1e-9, parameter


@pytest.mark.parametrize("name", ["jax_linear_mamba", "jax_mlp_mamba"])
def test_jax_logits(name):
    _, golden = read_golden(name)
    model, ids = golden_model(name, torch.float32)
    assert relative(model(ids).logits, golden["logits"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_every_split_of_every_prompt(name, monkeypatch):
    """Prompts of 1 to 40 tokens, in two calls, cut everywhere: float64, within 1e-9.

    The second call ends one token on, at the last and around the ends of mini-batches.
    """
    model, ids = golden_model(name)
    ends = {15, 16, 17, 31, 32, 33, 40}
    ids = ids[:1, :40]
    full = model(ids, use_cache=False).logits
    for first in range(1, 41):
        # Odd cuts without the package's scan, even ones with it.
        if first % 2:
            monkeypatch.setattr(mixer_ttt, "ttt_scan", None)
        start = model(ids[:, :first], use_cache=True)
        assert relative(start.logits, full[:, :first]) < 1e-9, first
        for length in (n for n in range(first + 1, 41) if n == first + 1 or n in ends):
            cache = copy.deepcopy(start.past_key_values)
            rest = model(ids[:, first:length], past_key_values=cache).logits
            assert relative(rest, full[:, first:length]) < 1e-9, (first, length)
        monkeypatch.undo()


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_token_by_token(name):
    model, ids = golden_model(name)
    full = model(ids, use_cache=False).logits
    cache = TTTCache(model.config)
    steps = [
        model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        for i in range(ids.shape[1])
    ]
    assert relative(torch.cat(steps, 1), full) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_unequal_prompts_gives_each_row_its_own_result(name):
    """Prompts of 1 to 40 tokens in one left-padded batch, float32: the greedy ids of each alone,
    taken without a cache."""
    model, ids = golden_model(name, torch.float32)
    lengths, new = range(1, 41), 3
    prompts = [ids[n % 2, :n] for n in lengths]
    batch = torch.stack([F.pad(p, (40 - len(p), 0), value=3) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (40 - len(p), 0)) for p in prompts])
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)[:, 40:]
    for prompt, row in zip(prompts, together):
        sequence = prompt[None]
        for _ in range(new):
            best = model(sequence, use_cache=False).logits[:, -1].argmax(-1)
            sequence = torch.cat([sequence, best[None]], dim=1)
        assert torch.equal(sequence[0, len(prompt) :], row), len(prompt)


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear_mamba", "mlp_transformer"])
def test_padding_on_either_side_and_between_calls(name, either_scan):
    model, ids = golden_model(name)
    rows = [ids[0, :21], ids[1, :34]]
    alone = [model(row[None], use_cache=False).logits[0] for row in rows]
    for left in (True, False):
        pad = (13, 0) if left else (0, 13)
        batch = torch.stack([F.pad(rows[0], pad, value=5), rows[1]])
        mask = torch.stack([F.pad(torch.ones(21), pad), torch.ones(34)]).long()
        held = mask.bool()
        logits = model(batch, attention_mask=mask, use_cache=False).logits
        assert relative(logits[0][held[0]], alone[0]) < 1e-9
        assert relative(logits[1], alone[1]) < 1e-9
        # The same in three calls; a call may hold nothing but padding of a row.
        cache, parts = TTTCache(model.config), []
        for start, stop in ((0, 9), (9, 10), (10, 34)):
            options = {"past_key_values": cache, "use_cache": True}
            columns = slice(start, stop)
            parts.append(model(batch[:, columns], attention_mask=mask[:, :stop], **options).logits)
        logits = torch.cat(parts, 1)
        assert relative(logits[0][held[0]], alone[0]) < 1e-9
        assert relative(logits[1], alone[1]) < 1e-9
        assert cache.position_B.tolist() == [21, 34]


@torch.no_grad()
def test_sampling_and_beams_with_and_without_the_cache():
    model, ids = golden_model("mlp_mamba", torch.float64)
    options = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        sampled.append(
            model.generate(
                ids[:, :19],
                do_sample=True,
                temperature=0.9,
                top_k=30,
                top_p=0.95,
                num_return_sequences=2,
                use_cache=use_cache,
                **options,
            )
        )
    assert torch.equal(*sampled) and sampled[0].shape == (4, 39)
    assert not torch.equal(sampled[0][0], sampled[0][1])
    beams = [
        model.generate(ids[:, :19], do_sample=False, num_beams=3, use_cache=use_cache, **options)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


def cached(model: TTTForCausalLM, ids: torch.Tensor) -> TTTCache:
    """A cache that has read `ids`."""
    cache = TTTCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_generation_goes_on_from_a_cache():
    """With all ids or the new ones, or embeddings; in pieces; padded on the left."""
    model, ids = golden_model("mlp_mamba")
    ids, ones = ids[:, :21], torch.ones_like(ids[:, :21])
    padded = ones.clone()
    padded[0, :7] = 0
    embeds = model.get_input_embeddings()(ids).detach()
    for mask in (ones, padded):
        best = model.generate(ids, attention_mask=mask, **GREEDY)[:, 21:]

        def check(read, *arguments, best=best, mask=mask, **options):
            cache = TTTCache(model.config)
            if read:
                with torch.no_grad():
                    model(ids[:, :read], attention_mask=mask[:, :read], past_key_values=cache)
            options |= {"past_key_values": cache, "attention_mask": mask}
            assert torch.equal(model.generate(*arguments, **options, **GREEDY)[:, -4:], best)

        for read in (5, 20):
            check(read, ids)
            check(read, ids[:, read:])
            check(read, inputs_embeds=embeds)
        check(5, ids, use_cache=False)
        check(0, ids, prefill_chunk_size=6)
        check(0, inputs_embeds=embeds)


def test_generation_from_what_does_not_fit_the_cache_is_refused():
    model, ids = golden_model("linear_transformer")
    ids, options = ids[:, :21], dict(GREEDY)
    for length in (16, 21):
        with pytest.raises(
            ValueError, match=f"{length} columns, past_key_values has read 21: give"
        ):
            model.generate(ids[:, :length], past_key_values=cached(model, ids), **options)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(ids, attention_mask=mask, **options)
    with pytest.raises(ValueError, match="has read 2 rows: go on with as many, not 1"):
        model(ids[:1], past_key_values=cached(model, ids))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"DynamicCache.*give .*TTTCache"):
            call(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="no assisted decoding"):
        cached(model, ids).crop(-1)


def test_the_cache_has_what_generation_reads_of_one():
    folder = Path(transformers.__file__).parent / "generation"
    code = "".join((folder / f"{name}.py").read_text() for name in ("utils", "candidate_generator"))
    read = set(re.findall(r"(?:cache|past_key_values)\.(\w+)", code))
    properties = {name for name in read if isinstance(getattr(Cache, name, None), property)}
    assert "is_compileable" in properties
    assert properties <= set(dir(TTTCache))


def test_generation_gives_hidden_states():
    model, ids = golden_model("linear_mamba")
    layers = model.config.num_hidden_layers
    out = model.generate(ids, output_hidden_states=True, return_dict_in_generate=True, **GREEDY)
    assert [len(states) for states in out.hidden_states] == [layers + 1] * 4
    assert out.hidden_states[0][-1].shape[:2] == ids.shape
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(model.model(ids).hidden_states) == layers + 1
    model.config.return_dict = False
    assert isinstance(model(ids), tuple) and isinstance(model.model(ids), tuple)
    assert torch.equal(model.generate(ids, **GREEDY), out.sequences)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@torch.no_grad()
def test_offloaded_weights(place, tmp_path):
    """Every weight is the one of a module that is called, which is where accelerate fetches it."""
    from accelerate import cpu_offload, disk_offload

    model, ids = golden_model("mlp_mamba")
    logits = model(ids).logits
    if place == "cpu":
        cpu_offload(model, "cpu")
    else:
        disk_offload(model, tmp_path, "cpu")
    assert model.model.layers[0].conv.conv.weight.device.type == "meta"
    assert torch.equal(model(ids).logits, logits)


def test_compiled():
    model = build(*random_official("linear", "transformer", layers=1))
    ids = torch.arange(40)[None]
    compiled = torch.compile(model, backend="eager")
    logits, gradients = [], []
    for call in (model, compiled):
        with torch.no_grad():
            logits.append(call(ids, use_cache=True).logits)
        model.zero_grad()
        call(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert relative(*logits) < 1e-9
    assert all(relative(*pair) < 1e-9 for pair in zip(*gradients))
    torch._dynamo.reset()


@torch.no_grad()
def test_another_default_device(either_scan):
    model, ids = golden_model("mlp_mamba")
    full, cache = model(ids).logits, cached(model, ids[:, :5])
    with torch.device("meta"):
        assert torch.equal(model(ids).logits, full)
        cache.batch_repeat_interleave(2)
        rest = ids[:, 5:].repeat_interleave(2, 0)
        logits = model(rest, past_key_values=cache).logits
    assert relative(logits[::2], full[:, 5:]) < 1e-9


def test_packed_documents_are_refused():
    model, ids = golden_model("linear_transformer")
    ids = ids[:, :12]
    mask = torch.tensor([[0] * 4 + [1] * 8, [1] * 10 + [0] * 2])
    for padding in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, padding)
        model(ids, attention_mask=mask, position_ids=positions)
    model(ids, position_ids=torch.arange(12)[None])
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with pytest.raises(ValueError, match="packed documents are not supported"):
        model(ids, position_ids=packed)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_autocast_leaves_the_inner_loop_alone(kind, either_scan, monkeypatch):
    """As under `Trainer(bf16=True)`: what the scan is given is rounded, the scan is not."""
    model = build(*random_official(kind, "mamba", layers=1), dtype=torch.float32)
    scan, seen = mixer_ttt.TTTMixer._scan, []

    def record(self, *arguments):
        seen.append((self, arguments, scan(self, *arguments)))
        return seen[-1][2]

    monkeypatch.setattr(mixer_ttt.TTTMixer, "_scan", record)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        for cached in (False, True):
            model(ids, use_cache=cached)
    for mixer, (*tokens, cache), output in seen:
        assert tokens[3].dtype == torch.float32
        assert torch.equal(output, scan(mixer, *tokens, cache and {}))
    x = torch.randn(2, 40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        under = seen[0][0]._inner_learning_rate(x)
    assert torch.equal(under, seen[0][0]._inner_learning_rate(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_decoding_costs_the_same_at_position_10000(kind):
    model = build(*random_official(kind, "mamba", layers=2), dtype=torch.float32)
    ids = torch.randint(0, 96, (1, 10_000), generator=torch.Generator().manual_seed(0))
    caches = {}
    for position in (100, 10_000):
        caches[position] = model(ids[:, :position], use_cache=True).past_key_values
    assert caches[100].memory_bytes() == caches[10_000].memory_bytes()
    seconds = {position: [] for position in caches}
    for _ in range(60):
        for position, cache in caches.items():
            # Of this process: other work on the machine does not count.
            started = time.process_time()
            model(ids[:, :1], past_key_values=cache)
            seconds[position].append(time.process_time() - started)
    medians = {position: statistics.median(times) for position, times in seconds.items()}
    assert medians[10_000] < 1.3 * medians[100], medians
    assert caches[10_000].position_B.tolist() == [10_060]


def test_saving_and_loading(tmp_path):
    model, ids = golden_model("mlp_mamba")
    with torch.no_grad():
        model.save_pretrained(tmp_path)
        again = TTTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.config.rope_theta == 10000.0 and again.config.tie_word_embeddings
        assert again.lm_head.weight is again.model.embed_tokens.weight
        half = TTTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        # What the inner loop starts from stays in float32, as it is trained.
        mixer = half.model.layers[0].seq_modeling_block
        for name in ("W1", "b2", "learnable_token_idx", "ttt_norm_weight", "learnable_ttt_lr_bias"):
            assert getattr(mixer, name).dtype == torch.float32, name
        assert relative(half(ids).logits, model(ids).logits) < 0.05


def test_trainer_learns_with_gradient_checkpointing(tmp_path, either_scan):
    from transformers import Trainer, TrainingArguments

    config, _ = random_official("linear", "mamba", layers=2, vocab=32)
    losses, gradients = {}, {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = TTTForCausalLM(TTTConfig(**config))
        sequence = torch.arange(48) % 7
        data = [{"input_ids": sequence, "labels": sequence}] * 32
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(sequence[None], labels=sequence[None]).loss.backward()
        gradients[checkpointing] = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                max_steps=8,
                learning_rate=3e-3,
                gradient_checkpointing=checkpointing,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=data,
            eval_dataset=data[:4],
        )
        before = trainer.evaluate()["eval_loss"]
        losses[checkpointing] = trainer.train().training_loss
        assert trainer.evaluate()["eval_loss"] < 0.7 * before
    assert abs(losses[True] - losses[False]) < 1e-5
    for name, gradient in gradients[False].items():
        assert gradient.abs().sum() > 0, name
        assert relative(gradients[True][name], gradient) < 1e-5, name


def test_gradient_checkpointing_and_a_cache():
    model, ids = golden_model("linear_transformer")
    greedy = model.generate(ids, **GREEDY)
    model.gradient_checkpointing_enable()
    model.train()
    for cache in (cached(model, ids[:, :5]), TTTCache(model.config)):
        with pytest.raises(ValueError, match="gradient checkpointing cannot go on from past"):
            model(ids, past_key_values=cache)
    assert model(ids, use_cache=True).past_key_values is None
    # Nothing runs again where there is no gradient.
    assert torch.equal(model.generate(ids, **GREEDY), greedy)


def test_a_wrong_configuration_is_refused():
    for wrong in ({"ttt_layer_type": "gru"}, {"hidden_act": "gelu"}, {"num_attention_heads": 3}):
        with pytest.raises(ValueError):
            TTTConfig(**wrong)
