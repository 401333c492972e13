"""Every recipe, and every overlay with the recipes it is meant for, has a plan that fits."""

from pathlib import Path

import pytest
import yaml
from harness import ROOT

from megatron_ttt.config import Config, load_config, to_dict
from megatron_ttt.planning import dry_run

RECIPES = ROOT / "yaml_recipes"
SIZES = ("125m", "350m", "760m", "1b")
LAYERS = ("ttt_linear", "ttt_mlp", "transformer")
CONTEXTS = {"": 2048, "_8k": 8192, "_32k": 32768}
HYBRIDS = {"hybrid": (("125m", "760m"), ("", "_32k")), "hybrid_mlp": (("125m",), ("",))}
MODELS = [
    *((layer, size, context) for layer in LAYERS for size in SIZES for context in CONTEXTS),
    *(
        (layer, size, context)
        for layer, (sizes, contexts) in HYBRIDS.items()
        for size in sizes
        for context in contexts
    ),
]
GPUS = (1, 8, 64)
GPU_GIB = 80e9 / 2**30
TOKENS_PER_STEP = 2**19
LACT = ("lact_125m_32k", "lact_760m_32k", "lact_3b_32k", "lact_ttt_linear_125m_32k")
MUON = RECIPES / "overlays/lact_muon.yaml"


def load(recipe: str, overlay: Path | None = None) -> Config:
    return load_config([RECIPES / f"{recipe}.yaml", *([overlay] if overlay else [])])


def overlay_for(size: str, context: str, gpus: int) -> Path | None:
    """What is laid over a recipe of this size and context on so many GPUs; None: nothing."""
    name = f"{context.strip('_')}_{gpus}gpu" if context else f"{size}_{gpus}gpu"
    path = RECIPES / "overlays" / f"{name}.yaml"
    return path if path.exists() else None


COMBINATIONS = [(*model, gpus) for model in MODELS for gpus in GPUS]


@pytest.mark.parametrize("layer,size,context,gpus", COMBINATIONS)
def test_a_plan_fits(layer, size, context, gpus):
    config = load(f"{layer}_{size}{context}", overlay_for(size, context, gpus))
    plan = dry_run(config, gpus, gpu="H100")
    assert plan["tokens_per_step"] == TOKENS_PER_STEP
    assert plan["memory_gib_per_rank"]["total"] < GPU_GIB


@pytest.mark.parametrize("overlay", [None, MUON], ids=["plain", "muon"])
@pytest.mark.parametrize("recipe", LACT)
def test_a_plan_of_lact_fits(recipe, overlay):
    plan = dry_run(load(recipe, overlay), 8, gpu="H100")
    assert plan["tokens_per_step"] == 2**20
    assert plan["memory_gib_per_rank"]["total"] < GPU_GIB


def test_nothing_is_left_over():
    """Each file is one of the combinations, or the toy of a laptop."""
    overlays = {overlay_for(size, context, gpus) for _, size, context, gpus in COMBINATIONS}
    assert set(RECIPES.glob("overlays/*.yaml")) == overlays - {None} | {MUON}
    recipes = {f"{layer}_{size}{context}" for layer, size, context in MODELS}
    others = {*LACT, "debug_cpu", "quickstart"}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == recipes | others


def differences(tree: dict, other: dict, prefix="") -> set[str]:
    """The keys at which two configurations differ."""
    found = set()
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= differences(value, other.get(key, {}), f"{prefix}{key}.")
        elif value != other.get(key):
            found.add(prefix + key)
    return found


def test_long_context_differs_in_the_length_alone():
    length = {"training.seq_length", "training.global_batch_size", "training.micro_batch_size"}
    for layer, size, context in MODELS:
        config, short = load(f"{layer}_{size}{context}"), to_dict(load(f"{layer}_{size}"))
        assert config.training.seq_length == CONTEXTS[context]
        changed = differences(to_dict(config), short) - {"run.dir", "training.recompute"}
        assert changed <= length


def test_layers_differ_in_the_mixer_alone():
    for layer, size, context in MODELS:
        linear = to_dict(load(f"ttt_linear_{size}{context}"))
        changed = differences(to_dict(load(f"{layer}_{size}{context}")), linear)
        changed -= {"run.dir", "model.pattern"}
        assert all(key.startswith("mixers.") for key in changed)


def test_hybrids_are_what_their_names_say():
    for context in ("", "_32k"):
        config = load(f"hybrid_125m{context}")
        assert config.model.pattern == [*["ttt_linear"] * 3, "attention"]
        assert config.mixers["attention"].window == 2048
    config = load("hybrid_mlp_125m")
    assert config.model.pattern == ["ttt_mlp", "attention"]
    assert config.mixers["attention"].window is None
    assert config.mixers["ttt_mlp"] == load("ttt_mlp_125m").mixers["ttt_mlp"]


def test_a_recipe_says_nothing_twice():
    """No file repeats a value that what it extends has already given."""
    for path in RECIPES.rglob("*.yaml"):
        tree = yaml.safe_load(path.read_text())
        parents = tree.pop("extends", [])
        parents = [parents] if isinstance(parents, str) else parents
        inherited: dict = {}
        for parent in parents:
            flatten(path.parent / parent, inherited)
        for key, value in leaves(tree).items():
            assert key not in inherited or inherited[key] != value, (path.name, key)


def test_every_run_has_a_folder_of_its_own():
    recipes = [path.stem for path in RECIPES.glob("*.yaml")]
    folders = {load(name).run.dir for name in recipes}
    assert len(folders) == len(recipes)


def flatten(path: Path, into: dict) -> None:
    """The values a recipe gives, parents first."""
    tree = yaml.safe_load(path.read_text())
    parents = tree.pop("extends", [])
    for parent in [parents] if isinstance(parents, str) else parents:
        flatten(path.parent / parent, into)
    into.update(leaves(tree))


def leaves(tree: dict) -> dict:
    """{"section.key": value}"""
    return {f"{section}.{key}": v for section, keys in tree.items() for key, v in keys.items()}
