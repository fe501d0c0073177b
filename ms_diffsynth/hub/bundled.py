"""Models that the package brings: by their name wherever a model's folder is asked for."""
from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "bundled_models"


def bundled(path: str | os.PathLike[str]) -> Path | None:
    """The folder of the bundled model ``path``; None when it names none, or there is such a file or folder here."""
    name = os.fspath(path)
    is_here = os.path.lexists(name)
    return None if is_here or name not in names() else FOLDER / name


def names() -> list[str]:
    """Of all bundled models."""
    return sorted(p.name for p in FOLDER.iterdir()) if FOLDER.is_dir() else []
