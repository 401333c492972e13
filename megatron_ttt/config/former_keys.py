"""Translate the keys of recipes and checkpoints older than `model.pattern` and `mixers`."""

from __future__ import annotations

import os
import sys
from typing import Any

from megatron_ttt.mixers import MIXERS

FORMER_KEYS = ("layer", "backbone", "mini_batch_size", "ttt_base_lr", "conv_kernel", "rope_theta")
"""Keys of the model section that are now `model.pattern` and options of mixers."""


def in_current_keys(tree: Any, source: str | None) -> Any:
    """Return a tree in which former keys stand as what they are now.

    A former key meant whatever mixer the layers had. In a part of a configuration it sets the
    option of every mixer that has it; in a whole one, of those in the pattern. source: where a part
    is from, for the line on stderr that names the new keys; None: the tree is whole, and no line.
    """
    model = tree.get("model") if isinstance(tree, dict) else None
    former = {key: model[key] for key in FORMER_KEYS if key in model} if _is_dict(model) else {}
    if not former:
        return tree
    model = {key: value for key, value in model.items() if key not in former}
    if "layer" in former:
        model.setdefault("pattern", [former["layer"]])
    named = {name: mixer.options_of_former_keys(former) for name, mixer in MIXERS.items()}
    named = {name: options for name, options in named.items() if options}
    if source is None:
        pattern = model.get("pattern")
        kept = [name for name in named if not isinstance(pattern, list) or name in pattern]
        named = {name: named[name] for name in kept}
    else:
        _say_new_keys(source, former, named)
    given = tree.get("mixers") or {}
    if not _is_dict(given) or not all(map(_is_dict, given.values())):
        return {**tree, "model": model}  # which is refused for its type
    mixers = {name: {**named.get(name, {}), **given.get(name, {})} for name in [*named, *given]}
    return {**tree, "model": model, **({"mixers": mixers} if mixers else {})}


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _say_new_keys(source: str, former: dict[str, Any], named: dict[str, dict[str, Any]]) -> None:
    if int(os.environ.get("RANK", "0")):
        return  # rank 0 says it
    now = [f"model.pattern=[{former['layer']}]"] if "layer" in former else []
    for option in dict.fromkeys(option for options in named.values() for option in options):
        owners = [name for name, options in named.items() if option in options]
        now.append(f"mixers.{'|'.join(owners)}.{option}={named[owners[0]][option]}")
    old = ", ".join(f"model.{key}" for key in former)
    print(f"{source}: {old} is now {', '.join(now)}", file=sys.stderr, flush=True)
