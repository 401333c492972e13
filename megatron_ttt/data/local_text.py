"""Text that any machine already has, in C4's format, for trying things without a download.

CPython's reference manual as `help()` carries it (`pydoc_data.topics`), and the docstrings of the
standard library and of installed packages, read out of their sources with `ast`: nothing of them is
imported. The same installation gives the same files.
"""

import ast
import gzip
import hashlib
import json
import sysconfig
import tokenize
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ttt.data.atomic_file import PartialFile

# In the order they are read, until there is enough: those with most prose to the code come first.
_PACKAGES = ("numpy", "networkx", "sympy", "pip", "setuptools", "megatron", "triton", "torch")
_SKIPPED_DIRECTORIES = {"test", "tests", "testing", "site-packages", "dist-packages", "__pycache__"}
_MIN_CHARACTERS = 200
_VALIDATION_SHARE = 0.04
_TIMESTAMP = "1970-01-01T00:00:00Z"


@dataclass(frozen=True)
class LocalCorpus:
    """The shards that `write_local_corpus` wrote and what is in them; bytes are of UTF-8 text."""

    train_shards: list[Path]
    validation_shard: Path
    train_documents: int
    train_bytes: int
    validation_documents: int
    validation_bytes: int


class _Split:
    """Documents up to a number of bytes of text."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.documents: list[dict[str, str]] = []

    def add(self, text: str, url: str) -> None:
        size = len(text.encode())
        if self.bytes + size <= self.max_bytes:
            self.bytes += size
            self.documents.append({"text": text, "timestamp": _TIMESTAMP, "url": url})


def write_local_corpus(
    output_dir: str | Path,
    *,
    train_shards: int = 4,
    max_train_bytes: int = 12_000_000,
    max_validation_bytes: int = 500_000,
) -> LocalCorpus:
    """Write `c4-train.0000N-of-0000M.json.gz` and `c4-validation.00000-of-00001.json.gz`.

    Documents below 200 characters and exact duplicates are left out; a hash of its text decides
    the split a document goes to. Existing shards of the same names are replaced.
    """
    train, validation = _Split(max_train_bytes), _Split(max_validation_bytes)
    seen: set[bytes] = set()
    for url, text in _texts():
        if len(text) < _MIN_CHARACTERS:
            continue
        try:
            digest = hashlib.sha256(text.encode()).digest()
        except UnicodeEncodeError:  # an escape in a docstring can spell half a surrogate pair
            continue
        if digest in seen:
            continue
        seen.add(digest)
        in_validation = int.from_bytes(digest[:4], "big") < _VALIDATION_SHARE * 2**32
        (validation if in_validation else train).add(text, url)
        if train.bytes > 0.999 * max_train_bytes:
            break
    output_dir = Path(output_dir)
    train_paths = [
        output_dir / f"c4-train.{shard:05d}-of-{train_shards:05d}.json.gz"
        for shard in range(train_shards)
    ]
    validation_path = output_dir / "c4-validation.00000-of-00001.json.gz"
    for shard, path in enumerate(train_paths):
        _write_shard(path, train.documents[shard::train_shards])
    _write_shard(validation_path, validation.documents)
    return LocalCorpus(
        train_shards=train_paths,
        validation_shard=validation_path,
        train_documents=len(train.documents),
        train_bytes=train.bytes,
        validation_documents=len(validation.documents),
        validation_bytes=validation.bytes,
    )


def _texts() -> Iterator[tuple[str, str]]:
    """(url, text) of everything there is, in a fixed order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship Python without it
        topics = {}
    for name in sorted(topics):
        yield f"topic://{name}", topics[name].strip()
    paths = sysconfig.get_paths()
    sites = dict.fromkeys([paths["purelib"], paths["platlib"]])
    roots = [Path(paths["stdlib"])]
    roots += [Path(site) / package for package in _PACKAGES for site in sites]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            if _SKIPPED_DIRECTORIES.isdisjoint(parts):
                for name, text in _docstrings(path):
                    yield f"docstring://{'.'.join(parts)}/{name}", text


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(name, docstring) of the module, its classes and its functions; nothing from a file that
    this Python cannot parse."""
    try:
        with tokenize.open(path) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
            tree = ast.parse(stream.read())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    nodes = deque([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", ""), text
        # Statements only: ast.walk spends ten times as long on the expressions inside them.
        nodes.extend(n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt))


def _write_shard(path: Path, documents: list[dict[str, str]]) -> None:
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    output = PartialFile(path)
    try:
        output.stream.write(gzip.compress(lines.encode(), mtime=0))
        output.flush()
        output.publish()
    finally:
        output.discard()
