"""The code that goes into an export, and the same code in this process."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from megatron_ttt.hf import modeling_ttt
from megatron_ttt.hf.configuration_ttt import TTTConfig
from megatron_ttt.mixers.hf_code import HFCode
from megatron_ttt.stack import Architecture

HERE = Path(__file__).parent
COMMON = ("configuration_ttt.py", "cache_ttt.py", "layers_ttt.py", "modeling_ttt.py")


def codes_of(architecture: Architecture) -> dict[str, HFCode]:
    """Return the code of an architecture's mixers, by their names."""
    return {name: layer.mixer.hf_code for name, layer in architecture.kinds.items()}


def configuration_of(architecture: Architecture) -> HFCode | None:
    """Return the code of a configuration of its own, None where `TTTConfig` reads config.json."""
    form = architecture.hf_form
    return form and form.configuration


def configuration_class(architecture: Architecture) -> type[TTTConfig]:
    """Return the class that reads an architecture's config.json."""
    code = configuration_of(architecture)
    return TTTConfig if code is None else getattr(_load(code.path), code.class_name)


def write_code(
    folder: Path, mixers: dict[str, HFCode], configuration: HFCode | None = None
) -> None:
    """Write the files that transformers needs for a model with these mixers, by their names.

    configuration: the code of its configuration, where that is not `TTTConfig` itself. Raises
    ValueError where two files have one name.
    """
    files = {name: HERE / name for name in COMMON}
    codes = [*mixers.values(), *([configuration] if configuration else [])]
    for path in [path for code in codes for path in (*code.needs, code.path)]:
        if files.setdefault(path.name, path) != path:
            raise ValueError(f"{path} and {files[path.name]} have one name in an export")
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    with open(folder / "modeling_ttt.py", "a") as file:
        file.write(mixers_in_use(mixers, configuration))
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in sorted(files)))
    configuration_file = configuration.path.name if configuration else "configuration_ttt.py"
    with open(folder / configuration_file, "a") as file:
        # transformers 5 takes a model's class for that of another one whose folder has the same
        # name and whose configuration has the same code.
        file.write(f"\n# The code beside this file: {digest.hexdigest()[:16]}\n")


def mixers_in_use(mixers: dict[str, HFCode], configuration: HFCode | None) -> str:
    """Return the end of an export's modeling_ttt.py, which names its mixers and, where it is not
    `TTTConfig`, its configuration.

    transformers copies the files that a module imports by literal relative imports, and demands
    all of them; 4.57 copies no file that only such a file imports.
    """
    codes = [mixers[name] for name in sorted(mixers)]
    table = [f'MIXERS["{name}"] = {mixers[name].class_name}\n' for name in sorted(mixers)]
    if configuration is not None:
        codes.append(configuration)
        # AutoModel refuses a configuration of another class than the model names.
        kinds = ("TTTPreTrainedModel", "TTTModel", "TTTForCausalLM")
        table += [f"{kind}.config_class = {configuration.class_name}\n" for kind in kinds]
    needed = dict.fromkeys(path.stem for code in codes for path in code.needs)
    imports = [f"from .{stem} import __name__ as _\n" for stem in needed]
    imports += sorted({f"from .{code.path.stem} import {code.class_name}\n" for code in codes})
    return "".join(["\n# The mixers in use.\n", *imports, "\n", *table])


def load_code(mixers: dict[str, HFCode]) -> ModuleType:
    """Return the module `modeling_ttt`, which from now on has these mixers."""
    for name, code in mixers.items():
        for path in (*code.needs, code.path):
            module = _load(path)
        modeling_ttt.MIXERS[name] = getattr(module, code.class_name)
    return modeling_ttt


def _load(path: Path) -> ModuleType:
    """Return the module of a file, in the package of the files that it imports."""
    name = f"{modeling_ttt.__package__}.{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
