"""Reading what a checkpoint holds, without running code that it names.

torch writes `.metadata`, and every entry of a checkpoint, as a pickle, and a pickle can call any
function. A checkpoint may be a stranger's, so only what one of this trainer consists of is made of
it: tensors, numbers, texts, and torch's descriptions of tensors. All else is a UserError that names
the file and the class.
"""

from __future__ import annotations

import contextlib
import enum
import io
import pickle
import re
from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from torch._weights_only_unpickler import Unpickler
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, LoadPlan
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint import planner as torch_planner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from megatron_ttt.errors import UserError
from megatron_ttt.platform.mcore_workarounds.loading import reading_with

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_RANDOM_STATES = [
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),  # before numpy 2
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]
"""What NumPy's random state is made of, beside the tensors and numbers that torch allows."""


def read_metadata(path: Path) -> Metadata:
    """torch's description of the tensors in a checkpoint. Raises UserError where it cannot be
    read."""
    try:
        with open(path / METADATA_FILE, "rb") as file:
            found = _MetadataUnpickler(file).load()
        if isinstance(found, Metadata):
            return found
        error = f"it is a {type(found).__name__}"
    except UserError:
        raise
    except Exception as caught:  # unpickling a damaged file raises anything
        error = caught
    raise UserError(f"{path} is no complete checkpoint (.metadata: {error}): use another")


class _MetadataUnpickler(pickle.Unpickler):
    """Makes torch's own descriptions, and nothing else."""

    def __init__(self, file):
        super().__init__(file)
        self._path = file.name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo"):
            return torch.distributed.checkpoint.filesystem._StorageInfo
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return _path
        if (module, name) == ("builtins", "getattr"):
            return self._enum_member
        if module == "torch":
            found = vars(torch).get(name)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
        for described in (torch_metadata, torch_planner):
            found = vars(described).get(name)
            if isinstance(found, type) and module == described.__name__ == found.__module__:
                return found
        raise _refusal(self._path, f"{module}.{name}")

    def _enum_member(self, kind: Any, name: str) -> enum.Enum:
        """Return a member of an enumeration, which Python before 3.11.4 pickles by `getattr`."""
        if not isinstance(kind, enum.EnumMeta):
            raise _refusal(self._path, "builtins.getattr")
        return kind[name]


def _path(*parts: str) -> str:
    """Where a checkpoint was written is only told."""
    return "/".join(parts)


def load_plain(file: Path, **options: Any) -> Any:
    """torch.load of tensors, numbers, texts, and lists and dicts of them, into host memory.

    Raises UserError for a file that holds anything else, and what torch.load does for a damaged
    one.
    """
    with _refusing(file):
        return _load_plain(file, **options)


def _load_plain(file: Path | io.BytesIO, **options: Any) -> Any:
    with torch.serialization.safe_globals(_RANDOM_STATES):
        return torch.load(file, "cpu", weights_only=True, **options)


@contextlib.contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """torch's refusal to make something of a file, as a UserError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise UserError(f"{file} is damaged: it is no plain data; use another") from None
        raise _refusal(file, named[1]) from None


def _refusal(file: str | Path, named: str) -> UserError:
    return UserError(
        f"{file} asks for {named}, which could run code and which no checkpoint of torch "
        f"{torch.__version__} needs: it was not loaded; use another"
    )


def check_plain(path: Path) -> Metadata:
    """Refuse a checkpoint that names code anywhere, even where a command reads nothing.

    Reads the outline of each entry, none of its numbers. Returns what `read_metadata` does; raises
    UserError.
    """
    metadata = read_metadata(path)
    if (path / COMMON_FILE).exists():
        load_plain(path / COMMON_FILE)
    reader = CheckpointReader(path, metadata)
    entries = sorted(metadata.storage_data.values(), key=attrgetter("relative_path", "offset"))
    for name, places in groupby(entries, key=attrgetter("relative_path")):
        try:
            with open(path / name, "rb") as stream, _refusing(path / name):
                for place in places:
                    _outline(torch._C.PyTorchFileReader(reader._slice_file(stream, place)))
        except UserError:
            raise
        except Exception as error:  # a cut file fails in the unpickler
            raise UserError(f"{path} is damaged: cannot read {name} ({error})") from None
    return metadata


def _outline(entry: torch._C.PyTorchFileReader) -> Any:
    """What torch.load makes of an entry, its tensors without their numbers, on the meta device."""
    unpickler = Unpickler(io.BytesIO(entry.get_record("data.pkl")), encoding="utf-8")
    unpickler.persistent_load = _storage_without_numbers
    with torch.serialization.safe_globals(_RANDOM_STATES):
        return unpickler.load()


def _storage_without_numbers(saved: tuple) -> torch.TypedStorage:
    _, kind, _, _, count = saved
    dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
    storage = torch.UntypedStorage(count * dtype.itemsize, device="meta")
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


class CheckpointReader(FileSystemReader):
    """torch's reader of a checkpoint, without its unpickling, and of each tensor only what is asked
    for. metadata: of `read_metadata`."""

    def __init__(self, path: str | Path, metadata: Metadata):
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        """What was read before."""
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = torch_metadata.StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def read_data(self, plan: LoadPlan, planner):
        """Read file by file, so that a refusal can name the file."""

        def place(item: ReadItem) -> tuple[str, int]:
            found = self.storage_data[item.storage_index]
            return found.relative_path, found.offset

        items = sorted(plan.items, key=place)
        for name, of_file in groupby(items, key=lambda item: place(item)[0]):
            file = Path(self.path) / name
            with open(file, "rb") as stream, _refusing(file):
                for item in of_file:
                    self._read(item, stream, planner)
        return super().read_data(LoadPlan([]), planner)  # a future that is done

    def _read(self, item: ReadItem, stream, planner) -> None:
        place = self.storage_data[item.storage_index]
        entry = self._slice_file(stream, place)
        if item.type == LoadItemType.BYTE_IO:
            plain = io.BytesIO()  # the planner unpickles it
            torch.save(_load_plain(io.BytesIO(entry.read(place.length))), plain)
            plain.seek(0)
            planner.load_bytes(item, plain)
            return
        target = planner.resolve_tensor(item).detach()
        target.copy_(_read_part(entry, tuple(item.storage_offsets), tuple(item.lengths)))
        planner.commit_tensor(item, target)


def _read_part(stream, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    """A part of a tensor that torch.save wrote; reads from its first number to its last."""
    entry = torch._C.PyTorchFileReader(stream)
    whole = _outline(entry)
    if not isinstance(whole, torch.Tensor):
        raise ValueError("it holds no tensor where .metadata says so")
    part = whole
    for dim, (start, size) in enumerate(zip(offsets, sizes)):
        part = part.narrow(dim, start, size)
    if part.numel() == 0:
        return torch.empty(sizes, dtype=part.dtype)
    last = sum((size - 1) * stride for size, stride in zip(sizes, part.stride()))
    content = bytearray((last + 1) * part.itemsize)
    stream.seek(entry.get_record_offset("data/0") + part.storage_offset() * part.itemsize)
    if stream.readinto(content) != len(content):
        raise ValueError("it is cut short")
    return torch.frombuffer(content, dtype=part.dtype).as_strided(sizes, part.stride())


def load_tree(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint has for a tree of megatron-core's sharded tensors and objects; collective.

    Raises UserError where it names code.
    """
    metadata = read_metadata(path)
    if (path / COMMON_FILE).exists():  # megatron-core's own refusal is a traceback
        load_plain(path / COMMON_FILE)
    try:
        with reading_with(lambda folder: CheckpointReader(folder, metadata)):
            # Not validated, for which every rank would be sent what all ranks ask for.
            return dist_checkpointing.load(tree, str(path), validate_access_integrity=False)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):
                raise failure from None
        raise
