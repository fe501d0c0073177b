"""What a run left in its folder, as the numbers and images of a report. A run that goes on is read like one that ended:
files are appended to line by line, so a line that is being written is left out.
"""
from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from ms_diffsynth.config.settings import SETTINGS
from ms_diffsynth.errors import DataError, listing
from ms_diffsynth.redact import redact

MOST_POINTS, MOST_SHEETS, MOST_EVENTS = 1500, 40, 400  # of a curve; of sample images, and of events
MOST_BYTES = 40_000_000  # of sample videos
LEFT_OUT = ("saved", "checkpoint", "samples")  # events of which there are many, and which are seen elsewhere
OF_A_PLACE = ("output_path", "accept_changes")  # settings that say nothing about the training


def read_run(folder: Path) -> dict[str, Any]:
    """Everything a report shows of the run in ``folder``, as JSON has it. Raises: DataError for a folder of no run."""
    if not (folder / "loss.csv").is_file():
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise DataError(f"{folder} has no loss.csv, which every run writes; it holds {listing(there) or 'nothing'}. "
                        "Expected the output_path of a run.")
    steps, events = table(folder / "loss.csv"), list(lines(folder / "events.jsonl"))
    settings = settings_of(folder / "training_args.json")
    last = int(steps[-1]["step"]) if steps else 0
    end = next((e for e in reversed(events) if e.get("event") in ("end", "stopped", "start", "resumed")), {})
    batch = (settings.get("batch_size") or 1) * (settings.get("gradient_accumulation_steps") or 1)
    batch *= 2 if settings.get("with_prior_preservation") else 1  # as many class images
    return {
        "name": redact(folder.resolve().name),
        "status": {"end": "finished", "stopped": f"stopped by {end.get('reason', 'a signal')}"}.get(
            end.get("event", ""), "no end yet: it goes on, or was killed"),
        "steps": last,
        "planned": settings.get("max_train_steps"),
        "seconds": sum(row["seconds"] for row in steps if math.isfinite(row["seconds"])),
        "peak_memory_gib": end.get("peak_memory_gib"),
        "skipped": sum(row["is_skipped"] > 0 for row in steps),
        "curves": {"loss": curve(steps, "loss"), "learning rate": curve(steps, "learning_rate"),
                   "gradient norm": curve(steps, "grad_norm"),
                   "images per second": [[s, batch / t] for s, t in curve(steps, "seconds") if t > 0]},
        "validation": {name: curve(rows, name) for rows in [table(folder / "validation.csv")]
                       for name in (rows[0] if rows else {}) if name != "step"},
        "evaluation": {name: curve(rows, name) for rows in [table(folder / "evaluation.csv")]
                       for name in (rows[0] if rows else {}) if name != "step"},
        "samples": sheets(folder / "samples"),
        "settings": {name: shown(value) for name, value in sorted(settings.items())},
        "changed": sorted(name for name, value in settings.items() if name in SETTINGS and name not in OF_A_PLACE
                          and differs(value, SETTINGS[name].default)),
        "events": [{key: shown(value) for key, value in event.items()} for event in events
                   if event.get("event") not in LEFT_OUT][-MOST_EVENTS:],
    }


def table(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV of numbers; those that are torn, and what is no number, are left out."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or () if name]
        found = []
        for row in reader:
            numbers = {name: number(row.get(name)) for name in names}
            if math.isfinite(numbers.get("step", math.nan)):
                found.append(numbers)
        return found


def number(text: Any) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def curve(rows: Sequence[dict[str, float]], name: str) -> list[list[float]]:
    """[step, value] of a column, finite values only, means of neighbours where there are more than MOST_POINTS."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    width = -(-len(points) // MOST_POINTS) or 1
    parts = (points[k : k + width] for k in range(0, len(points), width))
    return [[part[-1][0], float(f"{sum(value for _, value in part) / len(part):.6g}")] for part in parts]


def lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn line is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def settings_of(path: Path) -> dict[str, Any]:
    """What the run was told; nothing where that was not written, or not to its end."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def differs(value: Any, default: Any) -> bool:
    """Whether a setting was chosen. JSON has lists where defaults are tuples."""
    value = tuple(value) if isinstance(value, list) else value
    return default is MISSING or value != default


def shown(value: Any) -> str:
    """A value in a table."""
    return value if isinstance(value, str) else json.dumps(value)


def sheets(folder: Path) -> list[dict[str, Any]]:
    """The sample images or videos of a run by step, as data URLs; evenly left out where there are more than
    MOST_SHEETS, or than MOST_BYTES.
    """
    found = sorted((int(path.stem.removeprefix("step-")), path) for kind in ("png", "webp")
                   for path in folder.glob(f"step-*.{kind}") if path.stem.removeprefix("step-").isdecimal())
    sizes = [path.stat().st_size for _, path in found]
    for width in range(1, len(found) + 1):
        chosen = [k for k in range(len(found)) if k % width == 0 or k == len(found) - 1]
        if len(chosen) <= 2 or (len(chosen) <= MOST_SHEETS and sum(sizes[k] for k in chosen) <= MOST_BYTES):
            break
    return [{"step": found[k][0], "image": data_url(found[k][1])} for k in (chosen if found else ())]


def data_url(path: Path) -> str:
    """An image as text that a page shows."""
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"
