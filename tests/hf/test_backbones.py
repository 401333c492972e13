"""Which combinations of the official backbone's three switches are models here."""

import itertools

import pytest

from megatron_ttt.errors import UserError
from megatron_ttt.hf.configuration import model_from_hf_config

SWITCHES = ("use_gate", "share_qk", "pre_conv")


def test_all_or_none():
    for values in itertools.product([True, False], repeat=3):
        official = dict(zip(SWITCHES, values))
        if len(set(values)) == 1:
            expected = "mamba" if values[0] else "transformer"
            assert model_from_hf_config(official).backbone == expected
            continue
        found = ", ".join(f"{name}={str(value).lower()}" for name, value in official.items())
        with pytest.raises(UserError) as refusal:
            model_from_hf_config(official)
        assert f"config.json: {found} is not supported" in str(refusal.value)
        assert "all three are true (the Mamba backbone)" in str(refusal.value)
        assert "all three are false (the Transformer backbone)" in str(refusal.value)


def test_a_word_is_no_switch():
    with pytest.raises(UserError, match='use_gate="false"'):
        model_from_hf_config(dict.fromkeys(SWITCHES, "false"))
