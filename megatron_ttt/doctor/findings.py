"""What a check found, and how it is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report. level: "good", "note" (know this), or "problem" (mend this)."""

    level: Literal["good", "note", "problem"]
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:8} {self.subject}: {self.text}"
