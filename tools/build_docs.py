#!/usr/bin/env python3
"""What the documentation takes from the code.

    python tools/build_docs.py

lists the error messages that docs/troubleshooting.md lacks, and those it has that the program no
longer prints. As a hook of mkdocs.yml this file makes the configuration reference from the code,
turns the formulas of docs/mathematics.md into MathML, which browsers show by themselves, and
unlinks what is not among the pages.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"
ERRORS = ("UserError", "TrainingError", "LostRankError", "ShardError")
INTRODUCTION = """# Configuration reference

A recipe is a YAML file of these sections. On the command line a key is `section.key=value`; a later
`--config` lies over an earlier one, and overrides over all. `--print-config` prints the result.
`extends:` names recipes that a recipe starts from.
"""


def main() -> None:
    """Compare the messages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    missing, stale = message_differences()
    for message in missing:
        print(f"missing: - `{message}`")
    for message in stale:
        print(f"no longer printed: - `{message}`")


def on_files(files, config):
    """mkdocs: add the page that is made from the code."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "configuration.md", content=configuration_page()))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """mkdocs: formulas as MathML; links out of docs/ as plain text."""
    if page.file.src_uri == "mathematics.md":
        markdown = re.sub(
            r"^```math\n(.*?)\n```$",
            lambda formula: _mathml(formula[1], display="block"),
            markdown,
            flags=re.DOTALL | re.MULTILINE,
        )
        markdown = re.sub(
            r"\$([^$]+)\$", lambda formula: _mathml(formula[1], display="inline"), markdown
        )
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


def _mathml(formula: str, display: str) -> str:
    from latex2mathml.converter import convert

    return convert(" ".join(formula.split()), display=display)


def configuration_page() -> str:
    """The configuration reference, made from the fields' types, defaults and docstrings."""
    from megatron_ttt.config import tree
    from megatron_ttt.mixers import MIXERS

    classes = classes_of(tree)
    sections = {
        section: [classes[name]] for section, _, name in fields(classes["Config"]) if name != "Any"
    }
    for name, mixer in MIXERS.items():
        sections[f"mixers.{name}"] = [
            classes_of(sys.modules[declared.__module__])[declared.__name__]
            for declared in reversed(mixer.Options.__mro__)
            if dataclasses.is_dataclass(declared)
        ]
    parts = [INTRODUCTION]
    for section, nodes in sections.items():
        rows = [
            f"| `{key}` | {kind} | {default} | {meaning} |"
            for node in nodes
            for key, default, kind, meaning in documented_fields(node)
        ]
        parts.append(
            f"## {section}\n\n{ast.get_docstring(nodes[-1])}\n\n"
            "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


def classes_of(module) -> dict[str, ast.ClassDef]:
    """The classes of a module's source by their names."""
    tree = ast.parse(Path(module.__file__).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def fields(node: ast.ClassDef) -> list[tuple[str, ast.expr | None, str]]:
    """(name, default, type) of a dataclass's fields."""
    return [
        (field.target.id, field.value, ast.unparse(field.annotation))
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    ]


def documented_fields(node: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """(key, default, type, meaning) in Markdown."""
    meanings = [
        " ".join(after.value.value.split())
        for field, after in zip(node.body, node.body[1:])
        if isinstance(field, ast.AnnAssign)
    ]
    rows = []
    for (key, default, kind), meaning in zip(fields(node), meanings):
        if "DEFAULT_PATTERN" in ast.unparse(default):
            shown = "`[ttt_linear]`"
        elif "default_factory" in ast.unparse(default):
            shown = "`[]`"
        elif isinstance(default, ast.Name):
            shown = "must be set"
        else:
            value = ast.literal_eval(default)
            shown = {None: "`null`", True: "`true`", False: "`false`"}.get(value, f"`{value}`")
            if isinstance(value, int | float) and not isinstance(value, bool):
                shown = f"`{value}`"
        kind = kind.replace(" | None", " or null").replace("list[str]", "list")
        rows.append((key, shown, kind, meaning.replace("|", "\\|")))
    return rows


def error_messages() -> dict[str, str]:
    """Every message of the project's own errors, and the file it is in.

    What is filled in while the program runs stands as …; an error that passes on a message made
    elsewhere has none of its own.
    """
    messages = {}
    sources = [*(ROOT / "megatron_ttt").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    for path in sorted([*sources, ROOT / "pretrain_ttt.py"]):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name in ERRORS and (message := template(node.args[0])):
                messages[message] = str(path.relative_to(ROOT))
    return messages


def template(node: ast.expr) -> str | None:
    """A string expression with … for what is not constant; None without a word that is."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    elif isinstance(node, ast.BinOp):
        text = (template(node.left) or "…") + (template(node.right) or "…")
    else:
        return None
    return text if re.search(r"\w", text) else None


def message_differences() -> tuple[list[str], list[str]]:
    """Messages that the page lacks, and those it has that are no longer printed."""
    printed, listed = set(error_messages()), set(listed_messages())
    return sorted(printed - listed), sorted(listed - printed)


def listed_messages() -> list[str]:
    """The messages that docs/troubleshooting.md names: its list items that are code."""
    return re.findall(r"^- `(.+)`$", TROUBLESHOOTING.read_text(), re.MULTILINE)


if __name__ == "__main__":
    main()
