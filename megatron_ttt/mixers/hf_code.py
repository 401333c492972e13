"""Where the code is that a mixer has in transformers."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HFCode:
    """A class in a file that goes into every export of a model with the mixer."""

    path: Path
    """The file, as hf/layers_ttt.py says a mixer's file must be."""
    class_name: str
    """The subclass of its `Mixer`."""
    needs: tuple[Path, ...] = ()
    """Further files that it imports, each after those that itself needs."""
