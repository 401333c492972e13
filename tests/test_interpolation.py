"""What a recipe may fill in: other keys' values, and nothing of the environment."""

import pytest
from harness import ROOT

from megatron_ttt.config import load_config
from megatron_ttt.errors import UserError

RECIPE = ROOT / "yaml_recipes/debug_cpu.yaml"


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SECRET}",
        "a/${oc.env:SECRET,none}",
        "${oc.${logging.wandb_project}:SECRET}",
        "${oc.decode:${oc.env:SECRET}}",
        "$${run.seed}{oc.env:SECRET}",
        r"\\${oc.env:SECRET}",
    ],
)
def test_nothing_of_the_environment(value, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "my-password")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: {RECIPE}\nlogging: {{wandb_project: '{value}'}}\n")
    for arguments in (([recipe],), ([RECIPE], [f"data.train={value}"])):
        with pytest.raises(UserError, match=r"only \$\{section\.key\} is filled in") as refusal:
            load_config(*arguments)
        assert "my-password" not in str(refusal.value)


def test_another_key(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: {RECIPE}\nrun: {{dir: 'runs/${{run.seed}}'}}\n")
    overrides = ["data.validation=${data.train}", "data.train=0.3 ${run.dir}/a 0.7 b"]
    config = load_config([recipe], overrides)
    assert config.run.dir == "runs/42"
    assert config.data.train == config.data.validation == ["0.3", "runs/42/a", "0.7", "b"]
