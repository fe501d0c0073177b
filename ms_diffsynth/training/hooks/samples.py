"""Sample images before the first step, every N steps and at the end, always of the same prompts and seeds."""
from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from ms_diffsynth.training.hooks.contract import Look
from ms_diffsynth.training.trainer import Trainer


class Samples(Look):
    """Writes ``samples/step-N.png``, and at the end ``samples/before_after.png``; of videos .webp and .mp4.

    Args:
        sampler: makes the images or videos with the current weights.
        captions: what is written under them.
        every: steps; None makes them before the first step and at the end.
    """

    def __init__(self, sampler: Callable[[], list[Image.Image]], captions: list[str], every: int | None = None):
        self.sampler, self.captions, self.every = sampler, captions, every

    def last_look(self, trainer: Trainer) -> int:
        return max(trainer.logger.samples, default=-1)

    def look(self, trainer: Trainer) -> None:
        logger = trainer.logger
        path = logger.log_samples(logger.num_steps, self.sampler(), self.captions)
        trainer.progress.say(f"samples: {path}")

    def end(self, trainer: Trainer) -> None:
        super().end(trainer)
        if trainer.accelerator.is_main_process:
            trainer.logger.write_comparison(self.captions)
