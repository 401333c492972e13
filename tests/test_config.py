"""Recipes, overrides, and what is refused: one line that says what would do."""

import ast
import inspect
import json
import sys
from pathlib import Path

import pytest
import yaml
from harness import ROOT, run

from megatron_ttt.config import (
    ModelConfig,
    check_layout,
    config_from_tree,
    load_config,
    to_dict,
)
from megatron_ttt.config.former_keys import in_current_keys
from megatron_ttt.errors import UserError
from megatron_ttt.mixers import MIXERS
from megatron_ttt.planning import count_parameters, dry_run
from megatron_ttt.stack import architecture_of

SWITCHES = ("use_gate", "share_qk", "pre_conv")

RECIPES = ROOT / "yaml_recipes"
PARAMETERS = {  # millions, of the paper's models: docs/mathematics.md, recipes
    "ttt_linear": {"125m": 110.4, "350m": 337.7, "760m": 733.6, "1b": 1285.6},
    "ttt_mlp": {"125m": 114.6, "350m": 348.8, "760m": 758.5, "1b": 1307.9},
    "transformer": {"125m": 109.5, "350m": 335.2, "760m": 728.7, "1b": 1279.9},
}
STEPS = {"125m": 4800, "350m": 13500, "760m": 29000, "1b": 50000}
PEAK = {"125m": 3e-3, "350m": 1.5e-3, "760m": 1.25e-3, "1b": 1e-3}


@pytest.mark.parametrize("size", STEPS)
@pytest.mark.parametrize("layer", PARAMETERS)
def test_recipes_are_the_papers(layer, size):
    config = load_config([RECIPES / f"{layer}_{size}.yaml"])
    plan = dry_run(config, 8)
    assert round(plan["parameters"] / 1e6, 1) == PARAMETERS[layer][size]
    assert plan["tokens_per_step"] == 2**19
    assert (config.training.steps, config.optimizer.lr) == (STEPS[size], PEAK[size])
    assert config.training.precision == "bf16"
    assert config.optimizer.decay_all
    assert (config.checkpoint.save_every, config.checkpoint.milestone_every) == (1000, 2000)
    if layer == "transformer":
        assert config.model.pattern == ["attention"]
    else:
        assert config.mixers[layer].base_lr == (1.0 if layer == "ttt_linear" else 0.1)


def test_parameter_count_is_the_built_models(cpu_platform):
    from megatron_ttt.model import build_chunk, make_transformer_config

    no_switches = [f"mixers.ttt_linear.{name}=false" for name in SWITCHES]
    for overrides in (
        ["model.pattern=[ttt_linear]"],
        ["model.pattern=[ttt_linear]", *no_switches],
        ["model.pattern=[ttt_mlp]"],
        ["model.pattern=[attention]", "model.tie_word_embeddings=false"],
        ["model.pattern=[attention]", "mixers.attention.num_kv_heads=2"],
        ["model.pattern=[ttt_mlp, attention]"],
    ):
        config = load_config([RECIPES / "debug_cpu.yaml"], overrides)
        chunk = build_chunk(config, make_transformer_config(config, cpu_platform), None)
        counts = count_parameters(architecture_of(config))
        assert sum(p.numel() for p in chunk.parameters()) == counts["total"], overrides
        fp32 = sum(p.numel() for p in chunk.parameters() if getattr(p, "keep_fp32", False))
        assert fp32 == counts["fp32"]


def test_print_config_is_a_recipe_for_the_same(tmp_path):
    overrides = ["training.exit_step=7", "data.train=0.3 a 0.7 b", "optimizer.lr=1e-4"]
    command = [sys.executable, "pretrain_ttt.py", "--config"]
    text = run([*command, RECIPES / "ttt_mlp_125m.yaml", "--print-config", *overrides])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(text)
    config = load_config([resolved])
    assert to_dict(config) == to_dict(load_config([RECIPES / "ttt_mlp_125m.yaml"], overrides))
    assert config.data.train == ["0.3", "a", "0.7", "b"]
    assert config.optimizer.lr == 1e-4


def test_dry_run_ends_with_json():
    recipe = RECIPES / "ttt_linear_1b.yaml"
    command = [sys.executable, "pretrain_ttt.py", "--config", recipe, "--dry-run"]
    plan = json.loads(run([*command, "--world-size", 64]).splitlines()[-1])
    assert plan["parameters"] == 1285639296
    assert plan["data_parallel_size"] == 64
    assert plan["tokens"] == 50000 * 2**19


def test_later_recipes_lie_over_earlier_ones(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"training": {"micro_batch_size": 2}}))
    config = load_config([RECIPES / "ttt_linear_125m.yaml", overlay])
    assert config.training.micro_batch_size == 2
    assert config.training.steps == 4800


REFUSED = [
    ("model.hidden=3", "model.hidden"),
    ("modle.hidden_size=3", "modle"),
    ("training.steps=many", "training.steps"),
    ("model.layer=ttt", "ttt_linear"),
    ("model.pattern=ttt", "model.mixer_modules"),
    ("model.pattern=[]", "model.pattern"),
    ("model.pattern=[ttt_linear,ttt_mlp,attention]", "model.num_layers=2"),
    ("model.mixer_modules=no.such.module", "no.such.module"),
    ("model.backbone=mambo", "model.backbone"),
    ("mixers.attention.widow=3", "num_kv_heads"),
    ("mixers.ttt_linear.mini_batch_size=0", "mixers.ttt_linear.mini_batch_size"),
    ("training.precision=fp16", "bf16"),
    ("training.steps=0", "training.steps"),
    ("training.steps", "key.path=value"),
    ("model.num_heads=5", "model.num_heads"),
    ("training.exit_step=9999", "training.exit_step"),
    ("optimizer.warmup_fraction=2", "optimizer.warmup_fraction"),
    ("model=3", "model"),
    ("data.train=[a,b", "data.train"),
    ("data.train=${foo}", "foo"),
    ("data.train=[[a]]", "data.train"),
    ("data.train.a=x", "data.train"),
    ("run.dir=${oops}", "oops"),
    ("model.conv_kernel=1", "mixers.ttt_linear.conv_kernel"),
    ("optimizer.beta2=1.5", "optimizer.beta2"),
    ("optimizer.lr=.nan", "optimizer.lr"),
    ("run.seed=-1", "run.seed"),
    ("training.eval_batches=0", "training.eval_batches"),
    ("data.num_workers=-1", "data.num_workers"),
    ("model.init_std=-1", "model.init_std"),
    ("model.hidden_size=36", "head_dim 9"),
    ("model.rope_theta=0", "mixers.ttt_linear.rope_theta"),
    ("optimizer.lr=.inf", "optimizer.lr"),
    ("run.timeout_minutes=.nan", "run.timeout_minutes"),
    ("training.exit_after_minutes=.nan", "training.exit_after_minutes"),
    ("training.eval_every=-3", "training.eval_every"),
    ("parallel.bucket_size=0", "parallel.bucket_size"),
]


@pytest.mark.parametrize("override,named", REFUSED)
def test_refuses_in_one_line(override, named):
    with pytest.raises(UserError) as refusal:
        load_config([RECIPES / "debug_cpu.yaml"], [override])
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_refuses_broken_recipes(tmp_path):
    path = tmp_path / "recipe.yaml"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/recipe.yaml").write_text("extends: ../recipe.yaml")
    for text in (
        *("model: [", "- a", "model: {x: 1}", "data: [1]", "\xff", "run: {dir: 2025-99-99}"),
        *("extends: recipe.yaml", "extends: gone.yaml", "extends: other/recipe.yaml"),
        *("extends:", "extends: 3", "extends: [1]"),
        *("training: {steps: 3}\ntraining: {log_every: 5}", "model: &model {layer: *model}"),
    ):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError) as refusal:
            load_config([path])
        assert "\n" not in str(refusal.value)
    path.write_text("logging: {<<: {wandb_mode: offline, live: true}, live: false}")
    logging = load_config([RECIPES / "debug_cpu.yaml", path]).logging
    assert logging.wandb_mode == "offline" and not logging.live
    path.write_text("model: {num_layers: 1}")
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        load_config([path])


IMPOSSIBLE = [
    (["parallel.tensor_model_parallel_size=3"], 3, "1, 2, 4"),
    (["parallel.pipeline_model_parallel_size=4"], 4, "num_layers=2"),
    (["parallel.sequence_parallel=true"], 1, "tensor_model_parallel_size"),
    (["parallel.tensor_model_parallel_size=2"], 3, "multiple of 2"),
    (["training.global_batch_size=6", "training.micro_batch_size=4"], 1, "global_batch_size"),
    ([], 3, "global_batch_size"),
    ([], 0, "0 processes"),
    (["parallel.virtual_pipeline_model_parallel_size=2"], 1, "virtual"),
    (
        [
            *("model.pattern=attention", "mixers.attention.num_kv_heads=1"),
            "parallel.tensor_model_parallel_size=2",
        ],
        2,
        "num_kv_heads=1",
    ),
    (
        [
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
            "training.seq_length=127",
        ],
        2,
        "seq_length=127",
    ),
]


@pytest.mark.parametrize("overrides,world_size,named", IMPOSSIBLE)
def test_refuses_impossible_layouts(overrides, world_size, named):
    config = load_config([RECIPES / "debug_cpu.yaml"], overrides)
    with pytest.raises(UserError, match=named) as refusal:
        check_layout(config, world_size)
    assert "\n" not in str(refusal.value)


FORMER = [
    ("model.layer=ttt_mlp", "model.pattern=[ttt_mlp]"),
    (
        "model.backbone=transformer",
        "mixers.ttt_linear.use_gate=false mixers.ttt_linear.share_qk=false "
        "mixers.ttt_linear.pre_conv=false",
    ),
    ("model.mini_batch_size=32", "mixers.ttt_linear.mini_batch_size=32"),
    ("model.ttt_base_lr=0.5", "mixers.ttt_linear.base_lr=0.5"),
    ("model.conv_kernel=3", "mixers.ttt_linear.conv_kernel=3"),
    ("model.rope_theta=100.0", "mixers.ttt_linear.rope_theta=100.0"),
]


@pytest.mark.parametrize("former,current", FORMER)
def test_former_keys_are_what_they_are_now(former, current, tmp_path, capsys):
    recipe = RECIPES / "debug_cpu.yaml"
    expected = load_config([recipe], current.split())
    assert capsys.readouterr().err == ""
    assert load_config([recipe], [former]) == expected
    said = capsys.readouterr().err
    key, _, value = former.partition("=")
    assert said.startswith(f"{former}: {key} is now ") and said.count("\n") == 1
    for override in current.split():
        assert override.split(".")[-1].split("=")[0] in said
    # In a recipe, too, which later ones lie over.
    old = tmp_path / "old.yaml"
    old.write_text(f"model: {{{key.removeprefix('model.')}: {value}}}")
    assert load_config([recipe, old]) == expected
    assert str(old) in capsys.readouterr().err
    assert load_config([old, recipe], current.split()) == expected


def test_a_former_tree_of_a_checkpoint_is_read_silently(capsys):
    current = to_dict(load_config([RECIPES / "debug_cpu.yaml"]))
    former = {**current, "model": {**current["model"], "layer": "ttt_linear", "ttt_base_lr": 0.5}}
    del former["mixers"], former["model"]["pattern"], former["model"]["tie_word_embeddings"]
    assert list(in_current_keys(former, None)["mixers"]) == ["ttt_linear"]
    config = config_from_tree(former, "a checkpoint")
    assert config.mixers["ttt_linear"].base_lr == 0.5 and config.model.pattern == ["ttt_linear"]
    assert capsys.readouterr().err == ""


def test_only_mixers_of_the_pattern_have_options():
    overrides = ["model.pattern=ttt_linear attention", "mixers.attention.window=8"]
    config = load_config([RECIPES / "debug_cpu.yaml"], overrides)
    assert list(config.mixers) == ["ttt_linear", "attention"]
    assert config.mixers["attention"].window == 8
    assert list(to_dict(config)["mixers"]) == ["ttt_linear", "attention"]


def documented(path: str) -> None:
    for node in [n for n in ast.parse(Path(path).read_text()).body if isinstance(n, ast.ClassDef)]:
        for field, after in zip(node.body, [*node.body[1:], None]):
            if isinstance(field, ast.AnnAssign) and node.name != "Config":
                described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert described, f"{node.name}.{field.target.id}"


def test_every_field_is_documented():
    documented(inspect.getsourcefile(ModelConfig))
    for mixer in MIXERS.values():
        documented(inspect.getsourcefile(mixer.Options))
