"""Evaluation during a run: KID of fresh sample images, and how many of them are copies, every N steps."""
from __future__ import annotations

import os
import time
from collections.abc import Callable

from PIL import Image

from ms_diffsynth.data.plots import kid_curve
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.evaluate import Evaluator
from ms_diffsynth.storage.files import write_file
from ms_diffsynth.training.hooks.contract import Look
from ms_diffsynth.training.hooks.rows import read_rows, write_rows
from ms_diffsynth.training.state import run_folder
from ms_diffsynth.training.trainer import Trainer

FILE = "evaluation.csv"
COLUMNS = ("step", "kid", "kid_low", "kid_high", "kid_floor", "memorised")


class Evaluation(Look):
    """Compares images of a model in training with real ones, before the first step, every N steps and at the end;
    docs/how_to/evaluation.md says what the numbers mean.

    Each evaluation adds a row to ``evaluation.csv`` and an event to events.jsonl, draws ``kid.png`` anew, and writes
    ``samples/nearest-step-N.png``: the images nearest to real ones, beside these.

    Args:
        sampler: ``sampler(count)`` makes this many images with the present weights, the same ones for the same weights.
        reference: folder of real images; described once, when the hook is made.
        count: how many images are made.
        every: steps.

    Raises: ConfigError without a sampler; DeviceError without the extra [eval]; DataError for an unusable folder.
    """

    def __init__(self, sampler: Callable[[int], list[Image.Image]] | None, reference: str | os.PathLike[str] | None,
                 count: int, every: int):
        if sampler is None:
            raise ConfigError("evaluation_steps is set, but no images are made: set sample_prompts (sample_count for "
                              "images without prompts), or remove evaluation_steps.")
        if reference is None:
            raise ConfigError("evaluation_steps is set, but the real images are unknown: set evaluation_reference to a "
                              "folder.")
        self.sampler, self.count, self.every = sampler, count, every
        self.evaluator = Evaluator(reference)
        self.rows: list[dict[str, float]] = []

    def start(self, trainer: Trainer) -> None:
        if trainer.resumed_from is not None:
            self.rows = read_rows(run_folder(trainer.resumed_from) / FILE, trainer.logger.num_steps)
        super().start(trainer)

    def last_look(self, trainer: Trainer) -> int:
        return self.rows[-1]["step"] if self.rows else -1

    def look(self, trainer: Trainer) -> None:
        """Evaluate the present weights. Raises: OutputError."""
        step, logger, began = trainer.logger.num_steps, trainer.logger, time.perf_counter()
        found = self.evaluator.evaluate(self.sampler(self.count))
        self.rows.append({"step": step, **found.record()})
        rounded = [{name: round(value, 6) for name, value in row.items()} for row in self.rows]
        write_rows(logger.output_path / FILE, COLUMNS, rounded)
        write_file(logger.output_path / f"samples/nearest-step-{step}.png", found.nearest_png)
        logger.write_image("kid.png", kid_curve(self.rows))
        logger.scalars(found.record(), step)
        logger.event("evaluation", **found.record(), pictures=self.count,
                     reference=str(self.evaluator.reference.folder), seconds=round(time.perf_counter() - began, 2))
        trainer.progress.say(f"step {step}: KID {found.kid} on EfficientNet-Lite0 features, floor "
                             f"{found.floor[1]:.4f}; {found.is_memorised.sum()} of {self.count} near copies")
