"""stats and peek on a build whose index or manifest is damaged: one clear line, whatever it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ttt.data.inspection import peek, stats
from megatron_ttt.data.preprocess import preprocess
from megatron_ttt.data.verification import verify
from megatron_ttt.errors import UserError

HEADER = 34


@pytest.fixture(scope="module")
def files(shards, tokenizer, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("build")
    preprocess([f"{shards[0]}/*.gz"], str(folder / "c4"), tokenizer.model_path)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def build(files, tmp_path) -> Path:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path / "c4"


def tables(index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three tables of an index, as views of its bytes."""
    sequences = int(index[18:26].view("<u8")[0])
    content = index[HEADER:]
    return (
        content[: 4 * sequences].view("<i4"),
        content[4 * sequences : 12 * sequences].view("<i8"),
        content[12 * sequences :].view("<i8"),
    )


def set_item(table: int, item: int, value: int):
    def change(index: np.ndarray) -> None:
        tables(index)[table][item] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_item(0, 5, 2**31 - 1),
        set_item(0, 5, -3),
        set_item(1, 5, -4),
        set_item(1, 5, 2**40),
        set_item(1, 5, 0),
        set_item(2, 5, 2),
        set_item(2, 5, -1),
        set_item(2, 5, 2**40),
        set_item(2, 0, 1),
    ],
)
@pytest.mark.parametrize("look", [stats, lambda prefix: list(peek(prefix, first=3))])
def test_a_damaged_index_is_named_before_it_is_read(build, change, look):
    path = build.with_name("c4_text_document.idx")
    index = np.fromfile(path, np.uint8)
    change(index)
    index.tofile(path)
    with pytest.raises(UserError, match=rf"^{path} is corrupt \("):
        look(str(build))


def test_peek_refuses_ids_outside_the_vocabulary(build):
    path = build.with_name("c4_text_document.bin")
    tokens = np.fromfile(path, "<u2")
    tokens[3] = 330
    tokens.tofile(path)
    with pytest.raises(UserError, match=rf"{path} holds token ids outside 0\.\.329"):
        list(peek(str(build)))


def places(content, place=()):
    """Where every key of a content stands."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    elif isinstance(content, dict):
        yield from ((*place, key) for key in content)
    for key in content if isinstance(content, dict) else ():
        yield from places(content[key], (*place, key))


@pytest.mark.parametrize("change", ["without it", "of another kind"])
def test_no_key_can_be_missing_in_a_manifest(build, change):
    path = build.with_name("c4.manifest.json")
    sound = path.read_text()
    # What the input was like is told to the reader, not to the program.
    told = {("shards", 0, "size"), ("shards", 0, "sha256"), ("shards", 1, "size")}
    told |= {("shards", 1, "sha256"), ("version",)}
    for place in sorted(set(places(json.loads(sound))) - told, key=str):
        content = json.loads(sound)
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        if change == "without it":
            del holder[place[-1]]
        else:
            holder[place[-1]] = None
        path.write_text(json.dumps(content))
        for look in (stats, lambda prefix: list(peek(prefix)), lambda prefix: list(verify(prefix))):
            with pytest.raises(UserError, match=f"{path} is damaged"):
                look(str(build))
                raise AssertionError(place)
