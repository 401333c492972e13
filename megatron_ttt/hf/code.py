"""The code that goes into an export, and the same code in this process."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from megatron_ttt.hf import modeling_ttt
from megatron_ttt.mixers.hf_code import HFCode
from megatron_ttt.stack import Architecture

HERE = Path(__file__).parent
COMMON = ("configuration_ttt.py", "cache_ttt.py", "layers_ttt.py", "modeling_ttt.py")


def codes_of(architecture: Architecture) -> dict[str, HFCode]:
    """Return the code of an architecture's mixers, by their names."""
    return {name: layer.mixer.hf_code for name, layer in architecture.kinds.items()}


def write_code(folder: Path, mixers: dict[str, HFCode]) -> None:
    """Write the files that transformers needs for a model with these mixers, by their names.

    Raises ValueError where two files have one name.
    """
    files = {name: HERE / name for name in COMMON}
    for path in [path for code in mixers.values() for path in (*code.needs, code.path)]:
        if files.setdefault(path.name, path) != path:
            raise ValueError(f"{path} and {files[path.name]} have one name in an export")
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    with open(folder / "modeling_ttt.py", "a") as file:
        file.write(mixers_in_use(mixers))
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in sorted(files)))
    with open(folder / "configuration_ttt.py", "a") as file:
        # transformers 5 takes a model's class for that of another one whose folder has the same
        # name and whose configuration has the same code.
        file.write(f"\n# The code beside this file: {digest.hexdigest()[:16]}\n")


def mixers_in_use(mixers: dict[str, HFCode]) -> str:
    """Return the end of an export's modeling_ttt.py, which names its mixers.

    transformers copies the files that a module imports by literal relative imports, and demands
    all of them; 4.57 copies no file that only such a file imports.
    """
    codes = [mixers[name] for name in sorted(mixers)]
    needed = dict.fromkeys(path.stem for code in codes for path in code.needs)
    imports = [f"from .{stem} import __name__ as _\n" for stem in needed]
    imports += sorted({f"from .{code.path.stem} import {code.class_name}\n" for code in codes})
    table = [f'MIXERS["{name}"] = {mixers[name].class_name}\n' for name in sorted(mixers)]
    return "".join(["\n# The mixers in use.\n", *imports, "\n", *table])


def load_code(mixers: dict[str, HFCode]) -> ModuleType:
    """Return the module `modeling_ttt`, which from now on has these mixers."""
    for name, code in mixers.items():
        for path in (*code.needs, code.path):
            module = f"{modeling_ttt.__package__}.{path.stem}"
            if module not in sys.modules:
                # In the package of the files that they import.
                spec = importlib.util.spec_from_file_location(module, path)
                sys.modules[module] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[module])
        modeling_ttt.MIXERS[name] = getattr(sys.modules[module], code.class_name)
    return modeling_ttt
