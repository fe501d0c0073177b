"""Evaluation while a run goes on: KID of fresh sample pictures, and how many are copies, every so many steps."""
from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ms_diffsynth.data.plots import kid_curve
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.evaluate import Evaluator
from ms_diffsynth.storage.files import write_file
from ms_diffsynth.train.logger import ModelLogger

FILE = "evaluation.csv"
COLUMNS = ("step", "kid", "kid_low", "kid_high", "kid_floor", "memorised")


class RunEvaluation:
    """Compares pictures of a model in training with real ones; docs/how_to/evaluation.md says what the numbers mean.

    Each call adds a row to ``evaluation.csv`` and an event to events.jsonl, draws ``kid.png`` anew, and writes
    ``samples/nearest-step-N.png``: the pictures nearest to real ones, beside these.

    Args:
        sampler: ``sampler(count)`` makes so many pictures with the present weights, the same ones for the same weights.
        reference: folder of real pictures; described once, at the first evaluation.

    Raises: ConfigError without a sampler; DeviceError without the extra [eval]; DataError for an unusable folder.
    """

    def __init__(self, records: ModelLogger, sampler: Callable[[int], list[Image.Image]] | None,
                 reference: str | os.PathLike[str] | None, count: int):
        if sampler is None:
            raise ConfigError("evaluation_steps is set, but nothing makes pictures: set sample_prompts (sample_count "
                              "for pictures without prompts), or remove evaluation_steps.")
        if reference is None:
            raise ConfigError("evaluation_steps is set, but nobody says which pictures are real: set "
                              "evaluation_reference to a folder.")
        self.records, self.sampler, self.count = records, sampler, count
        self.evaluator = Evaluator(reference)
        self.rows: list[dict[str, float]] = []

    @property
    def is_done(self) -> bool:
        """Whether the present step is evaluated."""
        return bool(self.rows) and self.rows[-1]["step"] == self.records.num_steps

    def __call__(self) -> str:
        """Evaluate the present weights. Returns: a line to read. Raises: OutputError."""
        began, step = time.perf_counter(), self.records.num_steps
        found = self.evaluator.evaluate(self.sampler(self.count))
        self.rows.append({"step": step, **found.record()})
        folder = self.records.output_path
        write_file(folder / FILE, _csv(self.rows))
        write_file(folder / f"samples/nearest-step-{step}.png", found.nearest_png)
        self.records.write_image("kid.png", kid_curve(self.rows))
        self.records.scalars(found.record(), step)
        self.records.event("evaluation", **found.record(), pictures=self.count,
                           reference=str(self.evaluator.reference.folder),
                           seconds=round(time.perf_counter() - began, 2))
        return (f"step {step}: KID {found.kid} on EfficientNet-Lite0 features, floor {found.floor[1]:.4f}; "
                f"{found.is_memorised.sum()} of {self.count} near copies")

    def restore(self, run_folder: Path, step: int) -> None:
        """Go on with what was evaluated in ``run_folder`` up to ``step``."""
        file = run_folder / FILE
        if file.is_file():
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file.open())]
            self.rows = [row | {"step": int(row["step"])} for row in rows if row["step"] <= step]


def _csv(rows: list[dict[str, float]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: round(value, 6) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()
