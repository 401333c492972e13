"""Reads a configuration: YAML recipes, merged with `key.path=value` overrides.

A recipe may name others in `extends:`; it then holds only what differs from them. `${section.key}`
in a recipe or an override stands for that key's value, and nothing else is filled in: what a run is
told stays in its checkpoints, exports and logs, where a secret of the environment must not be.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ttt.config.checks import validate
from megatron_ttt.config.former_keys import in_current_keys
from megatron_ttt.config.tree import Config
from megatron_ttt.errors import UserError
from megatron_ttt.mixers import MIXERS, check_known, load_mixers

_REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")
_LISTS = {"data": ("train", "validation"), "model": ("pattern", "mixer_modules")}
"""Keys whose list may be written as words."""


def load_config(paths: list[str | Path], overrides: list[str] = ()) -> Config:
    """Read recipes, the later over the earlier, then `key.path=value` overrides, and validate.

    Raises UserError, one line, for a file, key, type or combination that cannot be used.
    """
    return _merge([item for path in paths for item in _read(Path(path))], overrides, by_hand=True)


def config_from_tree(tree: dict[str, Any], source: str, overrides: list[str] = ()) -> Config:
    """Return the configuration of a tree of plain data, under overrides, validated.

    The tree is a checkpoint's, and may be a stranger's: a `${...}` in it stands for itself. source:
    where it is from, for messages.
    """
    return _merge([(source, _literal(tree))], overrides)


def config_with_defaults(tree: dict[str, Any], path: Path, overrides: list[str] = ()) -> Config:
    """Return a whole configuration for a model at `path`, with defaults for what one that was not
    trained here lacks."""
    defaults = {
        "optimizer": {"lr": 0.0},
        "training": {"steps": 1, "precision": "fp32"},
        "run": {"dir": str(path.parent)},
    }
    for section, values in defaults.items():
        own = tree.get(section, {})
        if isinstance(own, dict):
            tree = {**tree, section: {**values, **own}}
    return config_from_tree(tree, str(path), overrides)


def _merge(trees: list[tuple[str, dict]], overrides: list[str], *, by_hand: bool = False) -> Config:
    """Lay trees and then overrides over the defaults; each comes with where it is from.

    by_hand: the trees are recipes: former keys in them are reported, and modules that they name are
    imported. Others may be a stranger's.
    """
    load_mixers()
    trees = [(source, in_current_keys(tree, source if by_hand else None)) for source, tree in trees]
    for _, tree in trees if by_hand else ():
        _load_modules(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is no override: write key.path=value")
        with _refusing(override):
            tree = OmegaConf.create()
            OmegaConf.update(tree, key, _value(key, text))
            tree = _by_hand(OmegaConf.to_container(tree), override)
        tree = in_current_keys(tree, override)
        _load_modules(tree)
        trees.append((override, tree))
    for _, tree in trees:
        _check_pattern(tree)
    merged = OmegaConf.structured(_schema())
    for source, tree in trees:
        with _refusing(source):
            merged = OmegaConf.merge(merged, tree)
    sections = _to_dataclass(merged)
    sections = {field.name: getattr(sections, field.name) for field in dataclasses.fields(Config)}
    # Of the mixers that are known, the model has those in its pattern.
    known, pattern = sections.pop("mixers"), sections["model"].pattern
    mixers = {name: getattr(known, name) for name in pattern if hasattr(known, name)}
    config = Config(mixers=mixers, **sections)
    validate(config)
    return config


def _load_modules(tree: dict[str, Any]) -> None:
    """Import what a tree names in `model.mixer_modules`, so that the mixers' options are known."""
    model = tree.get("model") if isinstance(tree, dict) else None
    modules = model.get("mixer_modules") if isinstance(model, dict) else None
    if isinstance(modules, list):
        load_mixers(name for name in modules if isinstance(name, str))


def _check_pattern(tree: Any) -> None:
    """Refuse unknown mixers before their options are: these name no cure."""
    model = tree.get("model") if isinstance(tree, dict) else None
    pattern = model.get("pattern") if isinstance(model, dict) else None
    if isinstance(pattern, list):
        check_known(name for name in pattern if isinstance(name, str) and "${" not in name)


def _schema() -> type:
    """Return the type of the tree, in which every known mixer's options have a section."""
    options = [(name, m.Options, field(default_factory=m.Options)) for name, m in MIXERS.items()]
    mixers = make_dataclass("Mixers", options)
    sections = [("mixers", mixers, field(default_factory=mixers))]
    return make_dataclass("Config", sections, bases=(Config,))


def _by_hand(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """A tree as people write it. Raises UserError where it asks for more than another key."""
    for text in _texts(tree):
        if "${" in _REFERENCE.sub("", text):
            raise UserError(
                f"{source}: {text!r}: only ${{section.key}} is filled in, nothing of the "
                "environment: write the value itself"
            )
    for section, keys in _LISTS.items():
        part = tree.get(section)
        for key in keys if isinstance(part, dict) else ():
            # One entry needs no brackets, and "0.3 a 0.7 b" is how Megatron writes a blend.
            words = part.get(key)
            if isinstance(words, str) and not _REFERENCE.fullmatch(words):
                part[key] = words.split()
    return tree


def _texts(value: Any) -> Iterator[str]:
    """Every text in a tree."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _literal(value: Any) -> Any:
    """A tree in which OmegaConf finds nothing to fill in: each `${`, and what backslashes are
    before it, is escaped."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _literal(part) for key, part in value.items()}
    return [_literal(part) for part in value] if isinstance(value, list) else value


def _value(key: str, text: str) -> Any:
    """What an override sets a key to. Where the key takes strings that is the text as it is
    written, or null, or a YAML list of them; else a YAML value."""
    kind = _type_of(key)
    if kind in (str, str | None, list[str]) and not (kind == list[str] and text.startswith("[")):
        return None if text in ("", "null", "~") else text
    node = yaml.compose(text, _Loader)
    if node is not None and node.end_mark.index < len(text.rstrip()):
        return text  # a comment follows: YAML would leave it out
    return yaml.load(text, yaml.BaseLoader if kind == list[str] else _Loader)


def _type_of(key: str) -> Any:
    """The declared type of a key; None where there is no such key."""
    kind = _schema()
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """What YAML and OmegaConf make of a tree they cannot use, as one line that names its source."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {_one_line(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{source}: an alias stands within what it stands for") from None
    except (TypeError, ValueError) as error:
        # OmegaConf's, of a mapping where a list belongs; YAML's, of a date that there is not
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: of two sections of one name the first would be lost."""

    def compose_mapping_node(self, anchor):
        node, keys = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value} stands twice", problem_mark=key.start_mark
                    )
                keys.add((key.tag, key.value))
        return node


def _read(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """The trees of a recipe and of those it extends, in the order they are merged."""
    if path.resolve() in map(Path.resolve, seen):
        raise UserError(f"{path} extends itself: {' -> '.join(map(str, (*seen, path)))}")
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not YAML: it is no text") from None
    with _refusing(str(path)):
        tree = yaml.load(text, _Loader)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not sections with keys")
    extends = tree.pop("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise UserError(f"{path}: extends={extends} is neither a recipe's path nor a list of them")
    trees = [item for name in parents for item in _read(path.parent / name, (*seen, path))]
    with _refusing(str(path)):
        return [*trees, (str(path), _by_hand(tree, str(path)))]


def _to_dataclass(merged) -> Any:
    with _refusing("the configuration"):
        missing = OmegaConf.missing_keys(merged)
        if missing:
            keys = ", ".join(sorted(missing))
            raise UserError(f"not set: {keys}. Set each in the recipe or as key.path=value")
        return OmegaConf.to_object(merged)


def _one_line(error: OmegaConfBaseException) -> str:
    """OmegaConf's first line, the key's full name, and for an unknown key what there is."""
    message = str(error).splitlines()[0]
    full_key = getattr(error, "full_key", None)
    parent = getattr(error, "object_type", None)
    if "not in" in message and dataclasses.is_dataclass(parent):
        names = ", ".join(f.name for f in dataclasses.fields(parent))
        return f"unknown key {full_key!r}; there are: {names}"
    return f"{full_key}: {message}" if full_key else message
