"""The known mixers: this package's, installed packages', and those of modules a model names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points

from megatron_ttt.errors import UserError
from megatron_ttt.mixers.base import Mixer

ENTRY_POINTS = "megatron_ttt.mixers"
"""The group in which an installed package names its mixers: `NAME = "package.module:MIXER"`."""
VARIABLE = "MEGATRON_TTT_MIXERS"
"""An environment variable that names modules to import, separated by commas."""
LOADED: dict[str, None] = {}
"""The modules that were imported for their mixers."""
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
    """Register the mixers of installed packages, of `MEGATRON_TTT_MIXERS` and of these modules.

    A module registers its mixers when it is imported, which runs it: `modules` are those that the
    user names, never those that a checkpoint or a config.json does. Raises UserError for a module
    that cannot be imported.
    """
    _load_entry_points()
    named = dict.fromkeys([*filter(None, os.environ.get(VARIABLE, "").split(",")), *modules])
    for module in named:
        try:
            importlib.import_module(module)
            LOADED[module] = None
        except Exception as error:  # whatever the module's own code runs into
            raise UserError(
                f"model.mixer_modules: cannot import {module}: {' '.join(str(error).split())}; "
                "install its package, or name its folder in PYTHONPATH"
            ) from None


def check_known(names: Iterable[object]) -> None:
    """Raise UserError for a name in a pattern that is no known mixer's."""
    for name in names:
        if name not in MIXERS:
            raise UserError(
                f"model.pattern: {name} is none of {', '.join(MIXERS)}; name the module of a mixer "
                f"of your own in model.mixer_modules, for a checkpoint or an export in {VARIABLE}"
            )


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
