"""The known mixers: this package's, installed packages', and those of modules a model names."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points

from megatron_ttt.errors import UserError
from megatron_ttt.mixers.base import Mixer

ENTRY_POINTS = "megatron_ttt.mixers"
"""The group in which an installed package names its mixers: `NAME = "package.module:MIXER"`."""
MIXERS: dict[str, Mixer] = {}
"""Every known mixer by its name in a pattern."""


def register_mixer(mixer: Mixer) -> Mixer:
    """Make a mixer known under its name, and return it.

    Raises TypeError for what is no `Mixer`, ValueError if the name is taken or no identifier.
    """
    if not isinstance(mixer, Mixer):
        raise TypeError(f"{mixer!r} is not an object of a subclass of Mixer")
    if not mixer.name.isidentifier():
        raise ValueError(f"{mixer.name!r} cannot name a mixer: use letters, digits and underscores")
    if MIXERS.setdefault(mixer.name, mixer) is not mixer:
        raise ValueError(f"two mixers are named {mixer.name}: rename one")
    return mixer


def load_mixers(modules: Iterable[str] = ()) -> None:
    """Register the mixers of installed packages and of these modules.

    A module registers its mixers when it is imported. It is looked up in Python's path alone: a
    checkpoint or a config.json from elsewhere may name it, and must not run a file that lies beside
    it. Raises UserError for a module that cannot be imported.
    """
    _load_entry_points()
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever the module's own code runs into
            raise UserError(
                f"model.mixer_modules: cannot import {module}: {' '.join(str(error).split())}; "
                "install its package, or name its folder in PYTHONPATH"
            ) from None


@cache
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        try:
            register_mixer(point.load())
        except Exception as error:  # as above
            raise UserError(
                f"the mixer {point.name} of an installed package cannot be loaded: "
                f"{' '.join(str(error).split())}"
            ) from None
