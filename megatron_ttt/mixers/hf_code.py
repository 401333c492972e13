"""Where the code is that a mixer has in transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HFCode:
    """A class in a file that goes into every export of a model with the mixer."""

    path: Path
    """The file, as hf/layers_ttt.py says a mixer's file must be."""
    class_name: str
    """The subclass of its `Mixer`."""
    needs: tuple[Path, ...] = ()
    """Further files that it imports, each after those that itself needs."""


def model_classes(configuration: str = "configuration_ttt.TTTConfig") -> dict[str, Any]:
    """Return the keys of config.json that name the classes of an export's own code.

    configuration: module and class that read config.json.
    """
    return {
        "architectures": ["TTTForCausalLM"],
        "auto_map": {
            "AutoConfig": configuration,
            "AutoModel": "modeling_ttt.TTTModel",
            "AutoModelForCausalLM": "modeling_ttt.TTTForCausalLM",
        },
    }
