"""What the plan and the manifests of a run hold, and whether one that was read holds it."""

from typing import Any

_ANY = "*"
_FILE = {"size": int, "sha256": str}
_BIN = (_FILE, {"size": int, "parts": [_FILE]})
"""Older manifests have one checksum, others one for each shard's part."""
_STREAM = {"documents": int, "tokens": int}
_INPUT = {"url": str, "listed_size": int, "modified": str}
_COUNTS = {"documents": int, "malformed": int}
_OPTIONS = {
    "backend": str,
    "json_keys": [str],
    "append_eod": bool,
    "prepend_bos": bool,
    "split": str,
    "validation_fraction": float | int,
    "groups": int,
    "max_document_bytes": int,
    "tokenizer": str,
    "vocab_size": int,
    "bos_id": int,
    "eos_id": int,
}

PLAN = {
    "tokenizer_model": str,
    "options": _OPTIONS,
    "shards": [{"url": str, "size": int, "modified": str}],
}
"""`plan.json`: a dictionary names its keys (`*` is any), a list the kind of its items, neither is
empty; a tuple holds alternatives."""

TASK = _COUNTS | {
    "input": _INPUT,
    "options": _OPTIONS,
    "text_bytes": int,
    "empty": int,
    "skipped": str,
    "streams": {_ANY: _STREAM | {"bin": _FILE, "idx": _FILE}},
}
"""The manifest of a shard that is done."""

COPIED = {"output": str, "offset": int, "total": int}
"""Where the .bin of a shard has gone: into which file of which length, and where in it."""

FINAL = {
    "tokenizer_model": str,
    "options": _OPTIONS,
    "totals": _COUNTS | {"tokens": int, "text_bytes": int, "empty": int, "skipped_shards": int},
    "outputs": {
        _ANY: _STREAM | {"split": str, "key": str, "shards": [str], "bin": _BIN, "idx": _FILE}
    },
    "shards": [_INPUT | _COUNTS | {"skipped": str, "streams": {_ANY: _STREAM}}],
}
"""`PREFIX.manifest.json`, beside the datasets."""


def fault(content: Any, shape: Any, place: str = "") -> str:
    """The first place where a content is not of a shape, as `outputs.c4.tokens`; "" for none."""
    if isinstance(shape, list):
        if not isinstance(content, list) or not content:
            return place
        parts = [(item, shape[0], f"{place}[{number}]") for number, item in enumerate(content)]
    elif isinstance(shape, dict):
        if not isinstance(content, dict) or not content:
            return place
        keys = content if _ANY in shape else shape
        parts = [
            (content.get(key), shape.get(key, shape.get(_ANY)), f"{place}.{key}".lstrip("."))
            for key in keys
        ]
    elif isinstance(shape, tuple):
        faults = [fault(content, one, place) for one in shape]
        return "" if "" in faults else faults[0]
    else:
        return "" if isinstance(content, shape) else place
    return next(filter(None, (fault(*part) for part in parts)), "")
