"""A finished build: its manifest, its datasets and the tokenizer it was made with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ttt.data.build_folder import Workspace
from megatron_ttt.data.dataset_check import check_control_ids
from megatron_ttt.data.indexed import Index, bin_path, check_indexed
from megatron_ttt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ttt.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """A pair: its index and its tokens, both mapped, and what its manifest says of it."""

    prefix: str
    index: Index
    tokens: np.ndarray
    entry: dict

    @property
    def documents(self) -> int:
        return len(self.index.documents) - 1

    def document(self, number: int) -> np.ndarray:
        """The token ids of a document; none for an empty one."""
        first, end = (int(i) for i in self.index.documents[number : number + 2])
        if first == end:
            return self.tokens[:0]
        start = int(self.index.offsets[first]) // self.index.dtype.itemsize
        return self.tokens[start : start + int(self.index.lengths[first:end].sum())]


def open_run(output_prefix: str) -> tuple[dict, list[Dataset]]:
    """The final manifest of a build, and its datasets.

    Raises `UserError` where the build is not complete, or a file is missing or of another size.
    """
    workspace = Workspace(output_prefix)
    final = workspace.load_final()
    if final is None:
        hint = "the build has not ended" if workspace.folder.is_dir() else "run the build first"
        raise UserError(f"{workspace.final_manifest} not found: {hint}")
    datasets = []
    for name, entry in final["outputs"].items():
        path = str(Path(workspace.output_prefix).with_name(name))
        check_indexed(path)
        index = Index(path)
        datasets.append(Dataset(path, index, np.memmap(bin_path(path), index.dtype, "r"), entry))
    return final, datasets


def run_tokenizer(final: dict, tokenizer_model: str | None) -> Tokenizer:
    """The tokenizer a build was made with. Raises `UserError` for another one."""
    path = tokenizer_model or final["tokenizer_model"]
    tokenizer = load_tokenizer(path, final["options"]["backend"])
    if tokenizer.sha256 != final["options"]["tokenizer"]:
        raise UserError(f"{path} is not the tokenizer of the build; name it: --tokenizer-model")
    check_control_ids(tokenizer, final)
    return tokenizer
