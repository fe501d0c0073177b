"""What runs leave in their tables."""
from __future__ import annotations

import csv
from pathlib import Path

import numpy as np


def records(folder: str | Path, name: str = "loss.csv") -> list[dict[str, str]]:
    with open(Path(folder, name), newline="") as file:
        return list(csv.DictReader(file))


def column(folder: str | Path, key: str = "loss") -> np.ndarray:
    return np.array([float(row[key]) for row in records(folder)])


def table(folder: str | Path) -> list[str]:
    """loss.csv without the seconds."""
    return [line.rsplit(",", 1)[0] for line in Path(folder, "loss.csv").read_text().splitlines()]
