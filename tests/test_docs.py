"""The pages: they build, their commands run, and they know every message and key."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import harness
import numpy as np
import pytest
from harness import ROOT, environment

sys.path.insert(0, str(ROOT / "tools"))
import build_docs

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->$")
# What stands in a page, and what is small enough for a test.
SMALLER = {
    "--vocab-size 32000": "--vocab-size 350",
    "--workers 16": "--workers 2",
    "--first 1000": "--first 10",
    "checkpoint-4000": "checkpoint-4",
    "checkpoint-4800": "checkpoint-4",
    "/tmp/": "",
}


def blocks(page: Path, language: str = "bash") -> list[tuple[str, str | None]]:
    """The fenced blocks of a page, each with why it is not run, if it says so."""
    found, lines = [], page.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip() == f"```{language}":
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
            mark = NOT_RUN.match(lines[number - 1].strip()) if number else None
            found.append(("\n".join(lines[number + 1 : end]), mark and mark[1]))
    return found


def commands(block: str) -> list[list[str]]:
    """The commands of a block, as words."""
    joined = block.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder like the clone's, with C4 shards of the license, a tokenizer, and finished runs."""
    import gzip
    import json

    from megatron_ttt.data.indexed import IndexedWriter
    from megatron_ttt.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("pages")
    shown = ("megatron_ttt", "tools", "yaml_recipes", "pretrain_ttt.py", "benchmarks", "examples")
    for name in shown:
        os.symlink(ROOT / name, folder / name)
    paragraphs = (ROOT / "LICENSE").read_text().split("\n\n")
    lines = [json.dumps({"text": text, "url": "", "timestamp": ""}) for text in paragraphs]
    (folder / "c4/en").mkdir(parents=True)
    for split, count in (("train", "01024"), ("validation", "00008")):
        for shard in range(2):
            path = folder / f"c4/en/c4-{split}.{shard:05d}-of-{count}.json.gz"
            path.write_bytes(gzip.compress(("\n".join(lines[shard::2]) + "\n").encode()))
    quickstart = folder / "runs/quickstart/data"
    quickstart.mkdir(parents=True)
    (folder / "text.jsonl").write_text("\n".join(lines))
    train_tokenizer([str(folder / "text.jsonl")], str(quickstart / "tokenizer"), 350)
    os.symlink(quickstart / "tokenizer.model", folder / "tokenizer.model")
    random = np.random.default_rng(0)
    for split, documents in (("train", 60), ("validation", 20)):
        writer = IndexedWriter(quickstart / f"{split}_text_document", np.dtype("<u2"))
        for _ in range(documents):
            ids = random.integers(3, 350, 300).astype("<u2")
            writer.append(ids.tobytes(), np.array([len(ids)], np.int32))
        writer.publish()
    recipe = ["pretrain_ttt.py", "--config", "yaml_recipes/debug_cpu.yaml", "training.steps=4"]
    recipe += ["checkpoint.save_every=1", "run.dir=runs/ttt_linear_125m"]
    run(["python", *recipe, "training.seq_length=32", "checkpoint.export_final=false"], folder)
    return folder


def run(words: list[str], folder: Path, exported: dict[str, str] | None = None) -> None:
    """Run one command of a page in the workplace, with what commands before it have exported."""
    program, *arguments = words
    if program == "export":
        exported.update(word.split("=", 1) for word in arguments)
        return
    if program == "torchrun":
        program, arguments = "python", ["-m", "torch.distributed.run", *arguments]
    assert program == "python", (
        f"mark {shlex.join(words)!r} as not run, or teach the test to run it"
    )
    environ = {**environment(), **(exported or {}), "PYTHONPATH": str(ROOT)}
    harness.run([sys.executable, *arguments], cwd=folder, env=environ)


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs_or_says_why_not(page, workplace):
    shutil.rmtree(workplace / "data", ignore_errors=True)  # another page's
    (workplace / "data").mkdir()
    if "--output-prefix data/tokenizer" not in page.read_text():
        os.symlink(workplace / "tokenizer.model", workplace / "data/tokenizer.model")
    exported: dict[str, str] = {}
    for block, why_not in blocks(page):
        if why_not:
            continue
        for written, small in SMALLER.items():
            block = block.replace(written, small)
        for words in commands(block):
            run(words, workplace, exported)


def test_a_block_is_run_unless_it_is_marked(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\npython a \\\n    b  # c\n```\n<!-- not run: needs a GPU -->\n```bash\nd\n```\n"
    )
    (first, why), (second, why_not) = blocks(page)
    assert commands(first) == [["python", "a", "b"]] and why is None
    assert commands(second) == [["d"]] and why_not == "needs a GPU"


EXAMPLE = ROOT / "examples/custom_mixer"


@pytest.mark.parametrize("language,ending", [("python", "py"), ("yaml", "yaml")])
def test_the_page_of_mixers_shows_the_example(language, ending):
    files = [path.read_text() for path in sorted(EXAMPLE.glob(f"*.{ending}"))]
    shown = [block for block, _ in blocks(ROOT / "docs/mixers.md", language)]
    assert len(shown) == {"python": 13, "yaml": 1}[language]
    for block in shown:
        forms = (block, textwrap.indent(block, "    "))  # the page shows a method without its class
        found = any(f"\n{form}\n" in text for text in files for form in forms)
        assert found, f"not in the example:\n{block}"


def test_the_page_of_mixers_shows_the_whole_mixer():
    """Every class, function and method of the example is on the page."""
    page = (ROOT / "docs/mixers.md").read_text()
    for path in EXAMPLE.glob("*.py"):
        defined = re.findall(r"^ *((?:class|def) .+)$", path.read_text(), re.MULTILINE)
        assert defined and not [line for line in defined if line not in page], path


def rows_of_architecture() -> list[tuple[list[str], str]]:
    """What each row of ARCHITECTURE.md's table is about, as paths, and what it says of it."""
    table = re.findall(
        r"^\| (`.+?) \| (.+) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE
    )
    rows = []
    for about, text in table:
        paths = re.findall(r"`([^`]+)`", about)
        folder = paths[0] if paths[0].endswith("/") else f"{Path(paths[0]).parent}/"
        rows.append(([path if "/" in path else folder + path for path in paths], text))
    return rows


def test_the_architecture_page_names_files_that_there_are():
    for paths, text in rows_of_architecture():
        folder = ROOT / paths[0]
        folder = folder if folder.is_dir() else folder.parent
        named = re.findall(r"`([\w/*]+(?:\.py|\.sh|/))`", text)
        for path in named:
            below = ROOT / "megatron_ttt" if "*" in path else folder
            found = (ROOT / path).exists() or any(below.rglob(path.rstrip("/")))
            assert found, (paths, path)
    every = {path.strip("/") for paths, _ in rows_of_architecture() for path in paths}
    package = {path.name for path in (ROOT / "megatron_ttt").glob("*") if path.name[0] not in "_."}
    assert package <= {path.removeprefix("megatron_ttt/") for path in every}


def test_modules_import_only_from_those_above_them():
    """The order of ARCHITECTURE.md's table."""
    order = [path.strip("/") for paths, _ in rows_of_architecture() for path in paths]
    parts = [
        path.split("/")[1].removesuffix(".py") for path in order if path.startswith("megatron")
    ]
    parts = list(dict.fromkeys(parts))
    for number, part in enumerate(parts):
        below = "|".join(parts[number + 1 :]) or "none"
        path = ROOT / "megatron_ttt" / part
        for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            imports = re.findall(
                rf"^ *(?:from|import) megatron_ttt\.(?:{below})\b.*|^ *from megatron_ttt import "
                rf".*\b(?:{below})\b.*",
                file.read_text(),
                re.MULTILINE,
            )
            assert not imports, (file, imports)


def test_every_error_message_has_its_cure():
    missing, stale = build_docs.message_differences()
    assert not missing, "list in docs/troubleshooting.md: " + "\n".join(f"- `{m}`" for m in missing)
    assert not stale, "no longer printed, take out of docs/troubleshooting.md: " + "\n".join(stale)


def test_messages_are_found_in_the_code():
    found = build_docs.error_messages()
    assert len(found) > 150
    assert found["training.precision=fp16 is not supported: use bf16 (or fp32)"] == (
        "megatron_ttt/config/checks.py"
    )
    assert "… is damaged (…): use another checkpoint" in found


def test_a_group_of_messages_is_followed_by_a_cure():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    after_a_list = re.findall(r"^- `.+`\n\n(.*)$", text, re.MULTILINE)
    assert after_a_list and not [line for line in after_a_list if line.startswith(("#", "-"))]


def test_the_reference_has_every_key():
    from megatron_ttt.config import Config
    from megatron_ttt.mixers import MIXERS

    page = build_docs.configuration_page()
    sections = {section.name: section.default_factory for section in dataclasses.fields(Config)}
    del sections["mixers"]
    for name, declared in {
        **sections,
        **{f"mixers.{n}": m.Options for n, m in MIXERS.items()},
    }.items():
        part = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for key in dataclasses.fields(declared):
            assert re.search(rf"^\| `{key.name}` \| .+ \| .+ \| .+ \|$", part, re.MULTILINE), key


@pytest.mark.docs
def test_the_pages_build_without_a_warning_or_a_network(tmp_path):
    pytest.importorskip("latex2mathml", reason="formulas need latex2mathml: pip install .[docs]")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**environment(), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    fetched = re.compile(r"<(?:script|img)[^>]+src=\"?https?:|<link[^>]+stylesheet[^>]+https?:")
    for page in (tmp_path / "site").rglob("*.html"):
        assert not fetched.search(page.read_text()), page
    mathematics = (tmp_path / "site/mathematics/index.html").read_text()
    assert "<math" in mathematics and "$" not in re.sub(
        r"<[^>]+>", "", mathematics.split("<article")[1]
    )
    assert "sequence_parallel" in (tmp_path / "site/configuration/index.html").read_text()


@pytest.mark.docs
def test_the_pictures_script_draws(workplace):
    run(["python", "tools/draw_explanation.py", "--steps", "2", "--output", "images"], workplace)
    for name in ("loss_by_position.svg", "inner_loss.svg", "explanation.json"):
        assert (workplace / "images" / name).stat().st_size > 1000
