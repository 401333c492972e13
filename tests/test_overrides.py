"""What `key.path=value` sets on the command line: the value as it is written."""

import pytest
from harness import ROOT

from megatron_ttt.config import load_config
from megatron_ttt.errors import UserError

RECIPE = ROOT / "yaml_recipes/debug_cpu.yaml"


def value(override: str):
    """What the override's key is then."""
    section, name = override.partition("=")[0].split(".")
    return getattr(getattr(load_config([RECIPE], [override]), section), name)


@pytest.mark.parametrize(
    "text",
    ["a #b", "#a", "0123", "1e3", "1_000", "true", "2025-01-01", "a: b", "[a", "*a", "'a'", " a "],
)
def test_a_string_is_what_is_written(text):
    assert value(f"run.dir={text}") == text
    assert value(f"data.tokenizer_model={text}") == text


@pytest.mark.parametrize(
    "override,expected",
    [
        ("data.train=a #b", ["a", "#b"]),
        ("data.train=[007, 0.30, 'x #y']", ["007", "0.30", "x #y"]),
        ("data.train=[]", []),
        ("data.tokenizer_model=null", None),
        ("training.exit_step=null", None),
        ("training.steps=9", 9),
        ("optimizer.lr=1e-4", 1e-4),
        ("logging.live=true", True),
    ],
)
def test_numbers_booleans_lists_and_null_are_read(override, expected):
    assert value(override) == expected


@pytest.mark.parametrize("override", ["training.steps=8 # 9", "data.train=[a #b, c]"])
def test_nothing_is_left_out(override):
    with pytest.raises(UserError) as refusal:
        load_config([RECIPE], [override])
    assert override.partition("=")[0] in str(refusal.value)
